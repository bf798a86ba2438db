#!/usr/bin/env bash
# TLS underneath the channel, as a user meets it: what works, and one clear line for what does not.
# usage: tls_test.sh TOOLS_DIR MAKE_TINY_MODEL_PROGRAM [SERVER COMMAND...]
. "$(dirname "$0")/programs.sh" || exit 1
tools=$1 make_tiny_model=$2
shift 2
serve=("$@")
[ $# -gt 0 ] || serve=("$tools/engine_serve")

# --- certificates: two CAs, each with a server and a client ---------------------------------------
new_key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
make_ca() {
  openssl req -x509 "${new_key[@]}" -keyout "$1.key" -out "$1.pem" -days 2 -subj "/CN=$1"
}
# make_certificate CA NAME DAYS EXTENSIONS
make_certificate() {
  openssl req "${new_key[@]}" -keyout "$2.key" -out "$2.csr" -subj "/CN=$2" &&
    openssl x509 -req -in "$2.csr" -CA "$1.pem" -CAkey "$1.key" -CAcreateserial -days "$3" \
      -out "$2.pem" -extfile <(printf '%s\n' "$4")
}
{
  make_ca ca && make_ca other_ca &&
    make_certificate ca tls_server 2 'subjectAltName=IP:127.0.0.1,DNS:localhost' &&
    make_certificate ca elsewhere 2 'subjectAltName=DNS:elsewhere.example' &&
    make_certificate ca expired -1 'subjectAltName=IP:127.0.0.1' &&
    make_certificate ca tls_client 2 'extendedKeyUsage=clientAuth' &&
    make_certificate other_ca stranger 2 'extendedKeyUsage=clientAuth' &&
    openssl pkey -in tls_server.key -aes256 -passout pass:word -out locked.key
} >openssl.log 2>&1 || { cat openssl.log; exit 1; }
echo "nothing" >text.pem

"$make_tiny_model" model || exit 1
"$tools/engine_prep" --quiet --model model --output prepared || exit 1
for name in client server; do
  "$tools/engine_keygen" --output "$name.key.noise" >/dev/null 2>&1 || exit 1
done
serve+=(--model prepared/body --identity server.key.noise --allow client.key.noise.pub)

# start LISTEN FLAGS...
start() {
  local listen=$1
  shift
  start_serving "${serve[@]}" --listen "$listen" "$@"
  port=${address##*:}
}
stop() {
  kill -TERM "$server"
  wait "$server" || fail "the server does not end cleanly: $(cat server.log)"
  server=
}
client() {
  "$tools/engine_run" -m prepared --server "${host:-127.0.0.1}:$port" --server-key server.key.noise.pub \
    --identity client.key.noise -p hello -n 4 --quiet "$@"
}
works() {
  client "$@" >out 2>err </dev/null || fail "does not work: $*: $(cat err)"
  cmp -s out expected || fail "another text over TLS: $*"
}
"$tools/engine_run" -m prepared -p hello -n 4 --quiet >expected || exit 1

# --- TLS ------------------------------------------------------------------------------------------
start 127.0.0.1:0 --tls-cert tls_server.pem --tls-key tls_server.key
works --tls-ca ca.pem
host=localhost works --tls-ca ca.pem
works --tls-ca <(cat other_ca.pem ca.pem)
works --tls-ca ca.pem --tls-cert tls_client.pem --tls-key tls_client.key
INFEMERAL_TLS_CA=ca.pem works
refused 3 'none of the CAs of --tls-ca' client --tls-ca other_ca.pem
refused 3 'speaks TLS, give --tls-ca' client
grep -q 'no TLS' server.log && fail "a server with TLS says that it has none"
stop

start 127.0.0.1:0 --tls-cert elsewhere.pem --tls-key elsewhere.key
refused 3 'certificate for another name' client --tls-ca ca.pem
stop

# --- both ends show a certificate -----------------------------------------------------------------
start 127.0.0.1:0 --tls-cert tls_server.pem --tls-key tls_server.key --tls-client-ca ca.pem
works --tls-ca ca.pem --tls-cert tls_client.pem --tls-key tls_client.key
refused 3 'give --tls-cert' client --tls-ca ca.pem
refused 3 'give --tls-cert' client --tls-ca ca.pem --tls-cert stranger.pem --tls-key stranger.key
refused 3 '--tls-ca' client
works --tls-ca ca.pem --tls-cert tls_client.pem --tls-key tls_client.key
stop

# --- without TLS ----------------------------------------------------------------------------------
start 127.0.0.1:0
works
refused 3 'no TLS' client --tls-ca ca.pem
grep -q 'no TLS' server.log && fail "a server on the loopback interface warns"
stop
start 0.0.0.0:0
works
[ "$(grep -c 'the transport has no TLS.*encrypted' server.log)" = 1 ] ||
  fail "not one line about the missing TLS: $(cat server.log)"
stop

# --- files that are not what they should be -------------------------------------------------------
port=1
good=(--listen 127.0.0.1:0 --tls-cert tls_server.pem --tls-key tls_server.key)
refused 2 'both --tls-cert and --tls-key' "${serve[@]}" --tls-cert tls_server.pem
refused 2 'both --tls-cert and --tls-key' "${serve[@]}" --tls-client-ca ca.pem
refused 2 'missing.pem' "${serve[@]}" --tls-cert missing.pem --tls-key tls_server.key
refused 2 'missing.key' "${serve[@]}" --tls-cert tls_server.pem --tls-key missing.key
refused 2 'text.pem holds no certificate' "${serve[@]}" --tls-cert text.pem --tls-key tls_server.key
refused 2 'text.pem holds no private key' "${serve[@]}" --tls-cert tls_server.pem --tls-key text.pem
refused 2 'locked.key .*passphrase' "${serve[@]}" --tls-cert tls_server.pem --tls-key locked.key
refused 2 'ca.key is not the key' "${serve[@]}" --tls-cert tls_server.pem --tls-key ca.key
refused 2 'expired.pem has expired' "${serve[@]}" --tls-cert expired.pem --tls-key expired.key
refused 2 'text.pem holds no certificate' "${serve[@]}" "${good[@]}" --tls-client-ca text.pem
refused 2 'needs --tls-ca' client --tls-cert tls_client.pem --tls-key tls_client.key
refused 2 'both --tls-cert and --tls-key' client --tls-ca ca.pem --tls-cert tls_client.pem
refused 2 'text.pem holds no certificate' client --tls-ca text.pem
refused 2 'tls_server.key is not the key' client --tls-ca ca.pem --tls-cert tls_client.pem \
  --tls-key tls_server.key
refused 2 'remote --server' "$tools/engine_run" -m prepared -p x --tls-ca ca.pem

key=$(sed -n 2p tls_server.key)
if grep -qF -e "$key" server.out server.log err out; then fail "a private key was logged"; fi
[ "$failures" = 0 ] && echo "all as it should be"
exit "$failures"
