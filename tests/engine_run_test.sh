#!/usr/bin/env bash
# The programs as a user meets them: results on stdout, one clear line for a mistake, exit codes, and
# nothing lost. usage: engine_run_test.sh TOOLS_DIR MAKE_TINY_MODEL_PROGRAM
. "$(dirname "$0")/programs.sh" || exit 1
tools=$1 make_tiny_model=$2

engine_run() { "$tools/engine_run" "$@"; }
lines() { if [ -e "$1" ]; then wc -l <"$1"; else echo 0; fi; }
expect_lines() { [ "$(lines "$1")" = "$2" ] || fail "$1 has $(lines "$1") lines, not $2"; }

"$make_tiny_model" model || exit 1
run 0 "$tools/engine_prep" --quiet --model model --output prepared
run 0 "$tools/engine_prep" --quiet --model model --output other

# --- what works -----------------------------------------------------------------------------------
run 0 engine_run -m prepared -p "hello" -n 8 --quiet
[ -s out ] || fail "no text on stdout"
[ ! -s err ] || fail "--quiet is not quiet: $(cat err)"
cp out first
run 0 engine_run -m prepared -p "hello" -n 8 --backend auto
[ "$(grep -cv '^info: running on the CPU: there is no usable GPU' err)" = 0 ] && [ "$(wc -l <err)" -le 1 ] ||
  fail "--backend auto says more than that there is no GPU: $(cat err)"
cmp -s out first || fail "another backend gives another text"
run 0 engine_run -m prepared/client -p "hello" -n 8 --quiet
cmp -s out first || fail "the client folder gives another text than the folder above it"
run 0 env INFEMERAL_MODEL=prepared INFEMERAL_MAX_TOKENS=8 INFEMERAL_QUIET=1 "$tools/engine_run" -p hello
cmp -s out first || fail "the environment variables do not work"

printf 'one\ntwo\n\nthree\n' >prompts.txt
run 0 engine_run -m prepared -f prompts.txt -n 4 -o results.jsonl --report report.json --profile
expect_lines results.jsonl 3
grep -q '^de_embed' err || fail "--profile prints no table"
python3 - <<'PY' || fail "report.json or results.jsonl is not what it should be"
import json
report = json.load(open("report.json"))
assert report["schema"] == "infemeral-report" and report["requests"]["completed"] == 3
assert report["mean_ttft_ms"] > 0 and report["tokens"]["output"] == 12
assert len(report["samples"]) == 3 and report["wire"]["steps"] == 12
assert report["phases"]["decode"]["explained_share"] > 0.5
head = report["head"]
assert head["mode"] == "certified" and head["certified_tokens"] + head["full_passes"] == 12
assert head["rows_rescored"] >= head["certified_tokens"]
lines = [json.loads(line) for line in open("results.jsonl")]
assert [line["index"] for line in lines] == [0, 1, 2] and all("text" in line for line in lines)
text = open("report.json").read()
assert "one" not in [w.strip('",:') for w in text.split()] and "prepared" not in text
PY
run 0 engine_run -m prepared -p x -n 2 --quiet --report /dev/stderr
[ -c /dev/stderr ] || [ -e /dev/stderr ] || fail "a device was replaced by a report"
grep -q '"schema"' err || fail "no report on /dev/stderr"
run 0 engine_run -m prepared --check
grep -q '^token: *ok' out || fail "--check does not say that a token came"
run 0 engine_run -m prepared -p "same seed" -n 12 --temp 1 --seed 5 --quiet
cp out first
run 0 engine_run -m prepared -p "same seed" -n 12 --temp 1 --seed 5 --quiet -t 1
cmp -s out first || fail "the same seed gives another text"
run 0 engine_run -m prepared -p "same seed" -n 12 --temp 1 --seed 5 --quiet --head full
cmp -s out first || fail "the full head gives another text than the certified one"
run 0 engine_run -m prepared -p "same seed" -n 12 --quiet --head int8
run 0 engine_run -m prepared -p "hello" --chat -n 4 --quiet --wire i8

# The subset head: counts made afterwards, or with the preparation; then it generates and says so.
refused 2 'engine_prep --output prepared/client --token-counts' engine_run -m prepared -p x --head subset
printf 'the text that is counted\n' >counted.txt
run 0 "$tools/engine_prep" --output prepared --token-counts counted.txt --subset-size 40
grep -q 'kept the 40 most frequent tokens: 100.00 % of the 25 in the text' err ||
  fail "engine_prep does not say what was kept: $(cat err)"
grep -q 'counted' err && fail "a text is in the log"
run 0 engine_run -m prepared -p "same seed" -n 12 --temp 1 --seed 5 --repeat-penalty 1.2 --quiet \
  --head subset --report subset_report.json
python3 - <<'PY' || fail "the report of the subset head is not what it should be"
import json
head = json.load(open("subset_report.json"))["head"]
assert head["mode"] == "subset" and head["certified_tokens"] == 0, head
assert 1 <= head["subset_hits"] + head["full_passes"] <= 12, head
PY
refused 2 'token counts already.*--force' "$tools/engine_prep" --output prepared --token-counts counted.txt
run 0 "$tools/engine_prep" --quiet --output prepared/client --token-counts counted.txt --force
run 0 "$tools/engine_prep" --quiet --model model --output counted --token-counts counted.txt
run 0 engine_run -m counted -p x -n 2 --quiet --head subset
[ ! -e other/client/subset.json ] || fail "there are token counts that nobody asked for"
run 0 "$tools/engine_prep" --quiet --model model --output counted --force
refused 2 'token-counts' engine_run -m counted -p x --head subset
: >empty_text.txt
refused 2 'nothing to do' "$tools/engine_prep" --output counted
refused 2 'missing.txt' "$tools/engine_prep" --model model --output unmade --token-counts missing.txt
[ ! -e unmade ] || fail "a model was prepared though its text is missing"
refused 2 'empty_text.txt: the text holds no token' "$tools/engine_prep" --output counted \
  --token-counts empty_text.txt
refused 2 'not a client folder' "$tools/engine_prep" --output nowhere --token-counts counted.txt
refused 2 'subset-size' "$tools/engine_prep" --output counted --token-counts counted.txt --subset-size 0
cut=$(head -c 60 prepared/client/subset.json)
echo "$cut" >counted/client/subset.json
refused 2 'subset.json.*not valid JSON' engine_run -m counted -p x --head subset

# Folded tables: the same body, and texts that come from tables only its owner may read.
run 0 "$tools/engine_prep" --model model --output folded --fold-cloak
[ ! -e folded/client/cloak.safetensors ] || fail "a matrix was stored that nobody needs"
run 0 engine_run -m folded -p "hello" -n 8 --quiet
[ -s out ] || fail "no text from folded tables"
run 0 engine_run -m folded -p "hello" -n 8 --quiet --wire i8 --head full --cloak-noise 0.1
chmod 644 folded/client/client.safetensors
refused 2 'chmod 600' engine_run -m folded -p x
refused 2 'cloak.*excludes' "$tools/engine_prep" --model model --output both --fold-cloak --cloak lazy

# Brackets, commas and words are text, from the command line and from the environment.
run 0 engine_run -m prepared -p '[INST] one, two [/INST]' -p '[three]' -n 2 --stop '[END]' --quiet -o brackets.jsonl
expect_lines brackets.jsonl 2
run 0 env INFEMERAL_PROMPT='[INST] one, two [/INST]' "$tools/engine_run" -m prepared -n 2 --quiet -o brackets.jsonl --overwrite
expect_lines brackets.jsonl 1
refused 2 'words' engine_run -m prepared -p some words
for number in -1 010 0x10 1e3 ''; do
  refused 2 'seed' engine_run -m prepared -p x "--seed=$number"
done
refused 2 'max-tokens' engine_run -m prepared -p x -n 010
refused 2 'two files' engine_run -m prepared -p x -o same.json --report same.json
ln -s brackets.jsonl also_brackets
refused 2 'two files' engine_run -m prepared -p x -o brackets.jsonl --overwrite --report also_brackets
expect_lines brackets.jsonl 1

run 0 engine_run --version
grep -q '^engine_run [0-9]' out || fail "--version"

# --- one bad item, the others go on ---------------------------------------------------------------
long=$(head -c 400 /dev/zero | tr '\0' x)
cat >mixed.jsonl <<JSON
{"prompt": "good"}
{"prompt": "unknown field", "colour": "red"}
{"prompt": ""}
{"prompt": "$long"}
not json
{"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}}
{"prompt": "bad sampling", "temperature": -1}
JSON
cp -r prepared untemplated && rm -f untemplated/client/chat_template.jinja
echo '{}' >untemplated/client/tokenizer_config.json
refused 1 'prompt 0: .*chat template' engine_run -m untemplated -p "hello" --chat -n 4 -o untemplated.jsonl
expect_lines untemplated.jsonl 1
run 1 engine_run -m prepared -f mixed.jsonl -n 4 -o mixed_results.jsonl
expect_lines mixed_results.jsonl 7
expect_lines err 5
python3 - <<'PY' || fail "mixed results"
import json
lines = [json.loads(line) for line in open("mixed_results.jsonl")]
bad = [i for i, line in enumerate(lines) if line.get("error")]
assert bad == [1, 2, 3, 4, 6], bad
assert lines[5]["response"]["body"]["usage"]["completion_tokens"] <= 2
assert "context" in lines[3]["error"]["message"], lines[3]
PY
grep -q "unknown field\|not json" err && fail "a prompt's text is in the log"

# --- mistakes -------------------------------------------------------------------------------------
refused 2 '--model' engine_run -p x
refused 2 'nothing to do' engine_run -m prepared
refused 2 'nowhere' engine_run -m nowhere -p x
refused 2 'client' engine_run -m model -p x
refused 2 'client' engine_run -m prepared/body -p x
refused 2 '--wire' engine_run -m prepared -p x --wire f64
refused 2 '--head' engine_run -m prepared -p x --head best
refused 2 'backend' engine_run -m prepared -p x --backend tpu
refused 2 'GPU memory mode' engine_run -m prepared -p x --gpu-memory some
refused 2 'cloak-noise' engine_run -m prepared -p x --cloak-noise 2
refused 2 'max-tokens' engine_run -m prepared -p x -n many
refused 2 'temperature is -1' engine_run -m prepared -f prompts.txt --temp -1
refused 2 'top_p is 2' engine_run -m prepared -f prompts.txt --top-p 2
refused 2 '--max-tokens' engine_run -m prepared -f prompts.txt -n 0
refused 2 '--stop' engine_run -m prepared -p x --stop ""
refused 2 'is a folder' engine_run -m prepared -p x --report .
refused 2 '--no-such-flag' engine_run -m prepared -p x --no-such-flag
refused 2 'missing.txt' engine_run -m prepared -f missing.txt
refused 2 'results.jsonl' engine_run -m prepared -p x -o results.jsonl
expect_lines results.jsonl 3
refused 2 'no/such/dir' engine_run -m prepared -p x -o no/such/dir/out.jsonl
refused 2 'stdout' engine_run -m prepared -p x -o - --stream
: >empty.txt
refused 2 'no prompt' engine_run -m prepared -f empty.txt
printf 'good\nwith a \0 in it\n' >binary.txt
refused 2 'binary.txt is not a text file: line 2 holds a NUL byte' engine_run -m prepared -f binary.txt -o unread.jsonl
printf 'caf\303\251\n\nna\357ve\n' >latin1.txt
refused 2 'latin1.txt is not a text file: line 3 is not valid UTF-8' engine_run -m prepared -f latin1.txt -o unread.jsonl
printf '{"prompt": "cut \342\202"}\n' >cut.jsonl
refused 2 'cut.jsonl is not a text file: line 1' engine_run -m prepared -f cut.jsonl -o unread.jsonl
refused 2 'is not a text file' engine_run -m prepared -f prepared/body/model.safetensors -o unread.jsonl
[ ! -e unread.jsonl ] || fail "an output was made for prompts that are no text"
run 2 sh -c "'$tools/engine_run' -m prepared -p x -n 2 --quiet >/dev/full"
grep -q stdout err || fail "a full disk under stdout is not reported: $(cat err)"
run 2 "$tools/engine_run" -m prepared -p x -n 2 -o /dev/full --overwrite
grep -q '/dev/full' err || fail "a full disk under the output is not reported: $(cat err)"
[ "$(id -u)" = 0 ] || { mkdir ro && chmod 500 ro && refused 2 'ro/' engine_run -m prepared -p x -o ro/a; }

mkdir alone && cp -r prepared/client alone/client
refused 2 'alone/body is not a body folder.*--server HOST:PORT' engine_run -m alone -p x
for model in prepared prepared/body; do
  refused 2 'give the model that this was made from' "$tools/engine_prep" --model "$model" --output unmade
done
cp -r model unreadable
echo '{"model": {"type": "Unigram"}}' >unreadable/tokenizer.json
refused 2 'tokenizer.json' "$tools/engine_prep" --model unreadable --output unmade
cp model/tokenizer.json unreadable/ && echo '{"top_p": "x"' >unreadable/generation_config.json
refused 2 'generation_config.json' "$tools/engine_prep" --model unreadable --output unmade
cp model/generation_config.json unreadable/
[ ! -e unmade ] || fail "a folder was made for a model that cannot be prepared"
refused 2 "nowhere holds no config.json; give a model's folder" "$tools/engine_prep" --model nowhere --output unmade
run 0 engine_run -m prepared --server-key unused.pub -p hello -n 2
grep -q '^warning: --server-key is not used' err || fail "no word about a key without a server: $(cat err)"

chmod 644 prepared/client/cloak.key
refused 2 'cloak.key' engine_run -m prepared -p x
chmod 600 prepared/client/cloak.key
cp -r prepared damaged
head -c 1000 prepared/client/client.safetensors >damaged/client/client.safetensors
refused 2 'client.safetensors' engine_run -m damaged -p x
cp prepared/client/client.safetensors damaged/client/
head -c 1000 prepared/body/model.safetensors >damaged/body/model.safetensors
refused 2 'model.safetensors' engine_run -m damaged -p x
cp prepared/body/model.safetensors damaged/body/
echo '{"model": 1}' >damaged/client/tokenizer.json
refused 2 'tokenizer.json' engine_run -m damaged -p x
rm -r damaged/body && cp -r other/body damaged/body && cp prepared/client/tokenizer.json damaged/client/
refused 3 'cloak' engine_run -m damaged -p x

# --- the server -----------------------------------------------------------------------------------
for name in server client stranger; do run 0 "$tools/engine_keygen" --output "$name.key"; done
start_server() {  # [ADDRESS]
  start_serving "$tools/engine_serve" --model prepared/body --listen "${1:-127.0.0.1:0}" \
    --identity server.key --allow client.key.pub
}
start_server
remote=(-m prepared --server "$address" --server-key server.key.pub --identity client.key)
run 0 engine_run -m prepared -p "hello" -n 8 --quiet
cp out first
run 0 engine_run "${remote[@]}" -p "hello" -n 8 --quiet
cmp -s out first || fail "the remote body gives another text than the local one"
run 0 engine_run "${remote[@]}" -p "hello" -n 8 --quiet --pad
cmp -s out first || fail "padded messages give another text"
refused 2 'server-key' engine_run -m prepared --server "$address" -p x
refused 2 'this is a secret key' engine_run -m prepared --server "$address" -p x --identity client.key \
  --server-key "$(cat server.key)"
refused 2 'this is a secret key' "$tools/engine_serve" --model prepared/body --identity server.key \
  --allow "$(cat client.key)"
refused 3 'listen|address' "$tools/engine_serve" --model prepared/body --identity server.key \
  --allow client.key.pub --listen "$address"
refused 2 'identity' engine_run -m prepared --server "$address" --server-key server.key.pub -p x
refused 3 'key|allow|client' engine_run -m prepared --server "$address" \
  --server-key server.key.pub --identity stranger.key -p x
refused 3 'key' engine_run -m prepared --server "$address" --server-key stranger.key.pub \
  --identity client.key -p x
refused 3 'cloak' engine_run -m other --server "$address" --server-key server.key.pub \
  --identity client.key -p x
refused 3 '127.0.0.1:1' engine_run -m prepared --server 127.0.0.1:1 --server-key server.key.pub \
  --identity client.key -p x -o unreached.jsonl
[ ! -e unreached.jsonl ] || fail "an empty output is left where no server was reached"
cp results.jsonl kept.jsonl
refused 3 '127.0.0.1:1' engine_run -m prepared --server 127.0.0.1:1 --server-key server.key.pub \
  --identity client.key -p x -o results.jsonl --overwrite
cmp -s results.jsonl kept.jsonl || fail "old results were lost where no server was reached"
refused 3 'cannot reach name.invalid:5000: no (such host|name server)' engine_run -m prepared --server name.invalid:5000 \
  --server-key server.key.pub --identity client.key -p x
python3 -u -m http.server 0 --bind 127.0.0.1 >web.out 2>&1 &
web=$!
for _ in $(seq 200); do grep -q '^Serving' web.out && break; sleep 0.05; done
refused 3 'does not answer in HTTP/2; check that the port is' engine_run -m prepared \
  --server "127.0.0.1:$(sed -n 's/^Serving HTTP on .* port \([0-9]*\) .*/\1/p' web.out)" \
  --server-key server.key.pub --identity client.key -p x
{ kill "$web"; wait "$web"; } 2>/dev/null
refused 2 'give HOST:PORT alone' engine_run -m prepared --server "http://$address" --server-key server.key.pub \
  --identity client.key -p x
serve=("$tools/engine_serve" --listen 127.0.0.1:0 --identity server.key --allow client.key.pub --model)
refused 2 'not a body folder.*use prepared/body' "${serve[@]}" prepared
refused 2 'is a client folder' "${serve[@]}" prepared/client
refused 2 'use the body folder that engine_prep wrote' "${serve[@]}" nowhere
refused 2 'host:port' engine_run -m prepared --server nonsense --server-key server.key.pub \
  --identity client.key -p x
chmod 644 client.key
refused 2 'client.key' engine_run -m prepared --server "$address" --server-key server.key.pub \
  --identity client.key -p x
chmod 600 client.key
refused 2 'no/such' engine_run -m prepared -p x --report no/such/dir/report.json

# The server dies in the middle of a batch: what is done stays, and the exit code says why.
for i in $(seq 2000); do echo "prompt number $i"; done >many.txt
engine_run "${remote[@]}" -f many.txt -n 64 --ignore-eos --retry 2 -o many.jsonl >out 2>err </dev/null &
client=$!
for _ in $(seq 200); do [ "$(lines many.jsonl)" -ge 3 ] && break; sleep 0.05; done
{ kill -9 "$server"; wait "$server"; } 2>/dev/null
wait "$client"
code=$?
server=
[ "$code" = 3 ] || fail "exit $code instead of 3 after the server died: $(cat err)"
grep -q 'prompts are done' err || fail "no word about what was done: $(cat err)"
grep -q 'gave up after 2 attempts' err || fail "no word about the attempts: $(cat err)"
done_lines=$(wc -l <many.jsonl)
[ "$done_lines" -ge 3 ] || fail "results were lost when the server died"
python3 -c 'import json, sys; [json.loads(line)["text"] for line in open("many.jsonl")]' ||
  fail "a result line is damaged"

# The server dies and comes back: nobody sees it in the results. Then the client is killed, in the
# middle of a line, and goes on where it was.
head -n 60 many.txt >sixty.txt
batch=(-f sixty.txt -n 48 --ignore-eos --temp 1)
run 0 engine_run -m prepared "${batch[@]}" -o unbroken.jsonl --quiet
same_texts() {
  python3 - "$1" <<'PY' || fail "$1 does not hold the texts of an unbroken run"
import json, sys
def texts(file): return sorted((line["index"], line["text"]) for line in map(json.loads, open(file)))
assert texts("unbroken.jsonl") == texts(sys.argv[1])
PY
}
start_server
remote=(-m prepared --server "$address" --server-key server.key.pub --identity client.key)
"$tools/engine_run" "${remote[@]}" "${batch[@]}" -o mended.jsonl --report mended_report.json >out 2>err </dev/null &
client=$!
for _ in 1 2 3; do
  before=$(lines mended.jsonl)
  for _ in $(seq 200); do [ "$(lines mended.jsonl)" -gt "$before" ] && break; sleep 0.02; done
  { kill -9 "$server"; wait "$server"; } 2>/dev/null
  start_server "$address"
done
wait "$client" || fail "a run does not survive its server: $(cat err)"
same_texts mended.jsonl
[ "$(grep -c 'connected again after' err)" = "$(grep -c . err)" ] ||
  [ "$(grep -c 'connect' err)" = "$(grep -c . err)" ] || fail "other lines than about connecting: $(cat err)"
python3 - <<'PY' || fail "the report does not count the reconnects"
import json
report = json.load(open("mended_report.json"))
assert 1 <= report["wire"]["reconnects"] <= 3, report["wire"]
assert report["tokens"]["replayed"] > 0 and report["requests"]["failed"] == 0
PY

"$tools/engine_run" "${remote[@]}" "${batch[@]}" -o part.jsonl >out 2>err </dev/null &
client=$!
for _ in $(seq 200); do [ "$(lines part.jsonl)" -ge 5 ] && break; sleep 0.02; done
refused 2 'another run' engine_run "${remote[@]}" "${batch[@]}" -o part.jsonl --continue --quiet
{ kill -9 "$client"; wait "$client"; } 2>/dev/null
truncate -s -9 part.jsonl
sed '$d' part.jsonl >whole_lines
[ "$(lines whole_lines)" -ge 4 ] || fail "the killed run left $(lines whole_lines) lines"
cp part.jsonl part_before
refused 2 'part.jsonl exists.*--continue' engine_run "${remote[@]}" "${batch[@]}" -o part.jsonl
refused 2 'continue.*line 1 is not' engine_run "${remote[@]}" -f many.txt -o results.jsonl --continue --quiet
refused 2 'output' engine_run "${remote[@]}" "${batch[@]}" --continue
refused 2 'continue.*overwrite|overwrite.*continue' engine_run "${remote[@]}" "${batch[@]}" \
  -o part.jsonl --continue --overwrite
refused 2 'not a file' engine_run "${remote[@]}" "${batch[@]}" -o /dev/null --continue
cmp -s part.jsonl part_before || fail "a refused run changed the results"
run 0 engine_run "${remote[@]}" "${batch[@]}" -o part.jsonl --continue
grep -q "$(lines whole_lines) of 60 prompts have a result" err || fail "no word about what is there: $(cat err)"
head -n "$(lines whole_lines)" part.jsonl | cmp -s - whole_lines || fail "earlier result lines were changed"
same_texts part.jsonl
run 0 engine_run "${remote[@]}" "${batch[@]}" -o parallel.jsonl --parallel 7 --report parallel_report.json
same_texts parallel.jsonl
python3 - <<'PY' || fail "the report of a parallel run is not what it should be"
import json
report = json.load(open("parallel_report.json"))
assert report["requests"]["completed"] == 60 and report["wire"]["handshakes"] == 1, report["wire"]
assert report["tokens"]["output"] == 60 * 48
assert report["phases"]["decode"]["explained_share"] > 0.5
PY
refused 2 'parallel.*output' engine_run "${remote[@]}" "${batch[@]}" --parallel 7

# Guesses spare round trips and change no text.
greedy=(-f sixty.txt -n 48 --ignore-eos --temp 0 --quiet)
run 0 engine_run -m prepared "${greedy[@]}" -o unbroken.jsonl --overwrite
run 0 engine_run "${remote[@]}" "${greedy[@]}" -o drafted.jsonl --draft-max 8 --report drafted_report.json
same_texts drafted.jsonl
python3 - <<'PY' || fail "the report does not count guesses"
import json
report = json.load(open("drafted_report.json"))
tokens, steps = report["tokens"], report["wire"]["steps"]
assert 0 < tokens["accepted"] < tokens["drafted"], tokens
assert steps + tokens["accepted"] == tokens["output"] == 60 * 48, (steps, tokens)
assert report["options"]["max_draft"] == 8
PY
refused 2 'draft-max' engine_run "${remote[@]}" "${greedy[@]}" --draft-max 32
run 1 engine_run -m prepared -f mixed.jsonl -n 4 -o mixed_parallel.jsonl --parallel 3 --quiet
expect_lines mixed_parallel.jsonl 7
# The allow list is read again on SIGHUP.
stranger=(-m prepared --server "$address" --server-key server.key.pub --identity stranger.key)
refused 3 'allow list' engine_run "${stranger[@]}" -p x
cp client.key.pub kept.pub
cat stranger.key.pub >>client.key.pub
kill -HUP "$server"
for _ in $(seq 100); do grep -q 'allow list again; clients: 2' server.log && break; sleep 0.05; done
run 0 engine_run "${stranger[@]}" -p x -n 2 --quiet
echo nonsense >client.key.pub
kill -HUP "$server"
for _ in $(seq 100); do grep -q 'stays as it was' server.log && break; sleep 0.05; done
run 0 engine_run "${stranger[@]}" -p x -n 2 --quiet
mv kept.pub client.key.pub
kill -HUP "$server"
for _ in $(seq 100); do grep -q 'allow list again; clients: 1' server.log && break; sleep 0.05; done
refused 3 'allow list' engine_run "${stranger[@]}" -p x
cp part.jsonl part_before
run 0 engine_run "${remote[@]}" "${batch[@]}" -o part.jsonl -c --quiet
cmp -s part.jsonl part_before || fail "a finished batch was run again"
run 0 engine_run "${remote[@]}" -f prompts.txt -n 2 -o fresh.jsonl --continue --quiet
expect_lines fresh.jsonl 3
kill -TERM "$server"
wait "$server"

# A signal that means nothing here changes nothing; Ctrl-C ends a run cleanly, and a server too.
start_server
remote=(-m prepared --server "$address" --server-key server.key.pub --identity client.key)
"$tools/engine_run" "${remote[@]}" -f many.txt -n 64 --ignore-eos -o stopped.jsonl >out 2>err </dev/null &
client=$!
for _ in $(seq 200); do [ "$(lines stopped.jsonl)" -ge 1 ] && break; sleep 0.05; done
kill -USR1 "$client" "$server"
kill -TERM "$client"
wait "$client"
[ $? = 130 ] || fail "an interrupted run does not exit with 130: $(cat err)"
kill -TERM "$server"
wait "$server" || fail "engine_serve does not end cleanly on SIGTERM"
server=

# Nothing secret was logged anywhere.
if grep -rqF -e "hello" -e "prompt number" server.out server.log err; then fail "a prompt was logged"; fi
secret=$(sed 's/.*://' client.key)
if grep -qF -e "$secret" server.out server.log err out; then fail "a secret key was logged"; fi

[ "$failures" = 0 ] && echo "all as it should be"
exit "$failures"
