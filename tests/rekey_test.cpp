// Keys that are replaced while the channel is in use: the cipher state, records, and a whole link.
#include <catch2/catch.hpp>
#include <chrono>
#include <cstring>
#include <limits>

#include "net/bytes.h"
#include "net/channel.h"
#include "tests/link_fixture.h"
#include "tests/test_random.h"

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;
constexpr CipherSuite kSuites[] = {CipherSuite::kAesGcm, CipherSuite::kChaChaPoly};
constexpr int kMore = 1, kRekey = 2;  // the flags of docs/protocol.md
constexpr std::uint64_t kReservedNonce = std::numeric_limits<std::uint64_t>::max();

bool skip_unavailable(CipherSuite suite) {
  if (cipher_suite_available(suite)) return false;
  WARN("skipped " << cipher_suite_name(suite) << ": this processor has no instructions for it");
  return true;
}

std::string random_text(std::size_t size) {
  std::string text(size, '\0');
  randombytes_buf(text.data(), text.size());
  return text;
}

SecretBytes<32> random_key() {
  SecretBytes<32> key;
  randombytes_buf(key.data(), key.size());
  return key;
}

std::string seal(FrameSealer& sealer, const std::string& frame) {
  std::string all;
  std::string data;
  for (std::span<const std::byte> rest = bytes_of(frame); !rest.empty();) {
    REQUIRE(sealer.seal(rest, data).ok());
    all += data;
  }
  return all;
}

// A reader that follows docs/protocol.md with nothing of the opener's: it counts what it saw.
struct Reader {
  explicit Reader(CipherState state) : cipher(std::move(state)) {}
  void read(const std::string& data) {
    for (std::size_t at = 0; at < data.size();) {
      const std::size_t length =
          static_cast<unsigned char>(data[at]) * 256u + static_cast<unsigned char>(data[at + 1]);
      std::string plain;
      REQUIRE(cipher.decrypt({}, bytes_of(data).subspan(at + 2, length), plain).ok());
      at += 2 + length;
      flags.push_back(plain[0]);
      sizes.push_back(plain.size());
      if ((plain[0] & kRekey) != 0) cipher.rekey();
    }
  }
  CipherState cipher;
  std::vector<int> flags;
  std::vector<std::size_t> sizes;
};

// A record that no sealer makes.
std::string record(CipherState& sender, const std::string& plaintext) {
  std::string message;
  REQUIRE(sender.encrypt({}, bytes_of(plaintext), message).ok());
  return std::string{static_cast<char>(message.size() >> 8), static_cast<char>(message.size())} +
         message;
}

}  // namespace

TEST_CASE("the next key is what the Noise specification computes from the last one") {
  for (CipherSuite suite : kSuites) {
    if (skip_unavailable(suite)) continue;
    SecretBytes<32> key = random_key();
    CipherState state(suite, key.copy());
    for (int round = 0; round < 5; ++round) {
      std::string sealed;
      REQUIRE(state.encrypt({}, bytes_of("before"), sealed).ok());
      state.rekey();
      CHECK(state.nonce() == static_cast<std::uint64_t>(round + 1));  // Rekey leaves it alone
      // REKEY(k), by hand: AEAD under the nonce 2^64 - 1, no associated data, 32 zeros.
      unsigned char nonce[12] = {0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255};
      unsigned char zeros[32] = {}, out[48];
      if (suite == CipherSuite::kAesGcm) {
        crypto_aead_aes256gcm_encrypt(out, nullptr, zeros, 32, nullptr, 0, nullptr, nonce,
                                      key.data());
      } else {
        crypto_aead_chacha20poly1305_ietf_encrypt(out, nullptr, zeros, 32, nullptr, 0, nullptr,
                                                  nonce, key.data());
      }
      std::memcpy(key.data(), out, 32);
      CipherState expected(suite, key.copy());
      expected.set_nonce(state.nonce());
      CipherState moved = std::move(state);  // the key travels with the object
      std::string ours, theirs;
      REQUIRE(moved.encrypt({}, bytes_of("after"), ours).ok());
      REQUIRE(expected.encrypt({}, bytes_of("after"), theirs).ok());
      CHECK(ours == theirs);
      state = std::move(moved);
      state.set_nonce(static_cast<std::uint64_t>(round + 1));
    }
  }
}

TEST_CASE("a new key neither mends a channel that was given up nor brings nonces back") {
  for (CipherSuite suite : kSuites) {
    if (skip_unavailable(suite)) continue;
    const SecretBytes<32> key = random_key();
    std::string out;
    CipherState poisoned(suite, key.copy());
    REQUIRE(!poisoned.decrypt({}, bytes_of(std::string(17, 'x')), out).ok());
    poisoned.rekey();
    CHECK(poisoned.encrypt({}, bytes_of("x"), out).code() == absl::StatusCode::kFailedPrecondition);

    // Two records are left, each the last one under its key.
    CipherState sender(suite, key.copy()), receiver(suite, key.copy());
    sender.set_nonce(kReservedNonce - 2);
    receiver.set_nonce(kReservedNonce - 2);
    FrameSealer sealer(std::move(sender), {.bytes = 1});
    FrameOpener opener(std::move(receiver));
    std::vector<std::string> frames;
    std::string last;
    for (const char* frame : {"one", "two"}) {
      last = seal(sealer, frame);
      REQUIRE(opener.open(bytes_of(last), 100, frames).ok());
    }
    CHECK(frames == std::vector<std::string>{"one", "two"});
    std::span<const std::byte> rest = bytes_of("three");
    CHECK(sealer.seal(rest, out).code() == absl::StatusCode::kResourceExhausted);
    CHECK(rest.size() == 5);
    CHECK(opener.open(bytes_of(last), 100, frames).code() == absl::StatusCode::kResourceExhausted);
  }
}

TEST_CASE("thousands of frames pass while keys are replaced by their bytes") {
  const std::uint64_t seed = reseed();
  CAPTURE(seed);
  for (CipherSuite suite : kSuites) {
    if (skip_unavailable(suite)) continue;
    const SecretBytes<32> key = random_key();
    const std::uint64_t limit = 10000 + random_index(10000);
    FrameSealer sealer(CipherState(suite, key.copy()), {.bytes = limit});
    FrameOpener opener(CipherState(suite, key.copy()));
    Reader reader(CipherState(suite, key.copy()));
    for (int i = 0; i < 3000; ++i) {
      // Short ones, and now and then a frame of several envelopes.
      const std::size_t size =
          i % 500 == 0 ? 2 * kMaxPiece + random_index(6 * kMaxPiece) : 1 + random_index(1000);
      const std::string frame = random_text(size);
      const std::string data = seal(sealer, frame);
      std::vector<std::string> frames;
      REQUIRE(opener.open(bytes_of(data), size, frames).ok());
      REQUIRE(frames.size() == 1);
      REQUIRE(frames[0] == frame);
      reader.read(data);
    }
    // Each record that reaches the limit, and no other, is the last one under its key.
    std::uint64_t under_key = 0;
    int keys = 0, inside = 0;
    for (std::size_t i = 0; i < reader.flags.size(); ++i) {
      under_key += reader.sizes[i];
      REQUIRE(((reader.flags[i] & kRekey) != 0) == (under_key >= limit));
      if (under_key < limit) continue;
      under_key = 0;
      ++keys;
      if ((reader.flags[i] & kMore) != 0) ++inside;
    }
    CHECK(keys > 50);
    CHECK(inside > 0);  // also in the middle of a frame
  }
}

TEST_CASE("a key is replaced when it is old, and by default neither soon nor after few bytes") {
  const SecretBytes<32> key = random_key();
  const auto cipher = [&] { return CipherState(CipherSuite::kChaChaPoly, key.copy()); };
  CHECK(RekeyLimits{}.bytes == 64ull * 1024 * 1024 * 1024);
  CHECK(RekeyLimits{}.age == std::chrono::hours(1));

  FrameSealer usual(cipher());
  Reader usual_reader(cipher());
  FrameSealer always(cipher(), {.age = Clock::duration::zero()});
  Reader always_reader(cipher());
  for (int i = 0; i < 100; ++i) {
    usual_reader.read(seal(usual, "frame"));
    always_reader.read(seal(always, "frame"));
  }
  CHECK(usual_reader.flags == std::vector<int>(100, 0));
  CHECK(always_reader.flags == std::vector<int>(100, kRekey));

  const auto age = std::chrono::milliseconds(30);
  const auto begin = Clock::now();
  FrameSealer aging(cipher(), {.age = age});
  Reader reader(cipher());
  do {
    reader.read(seal(aging, "frame"));
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  } while (reader.flags.back() == 0 && Clock::now() - begin < std::chrono::seconds(60));
  CHECK(reader.flags.back() == kRekey);
  CHECK(Clock::now() - begin >= age);
}

TEST_CASE("records of an old key are refused once it is replaced") {
  const SecretBytes<32> key = random_key();
  const auto cipher = [&] { return CipherState(CipherSuite::kChaChaPoly, key.copy()); };
  // What the sender says: a record that replaces the key between two that do not.
  CipherState sender = cipher();
  const std::string a = record(sender, std::string(1, '\0') + "a");
  const std::string b = record(sender, std::string(1, kRekey) + "b");
  sender.rekey();
  const std::string c = record(sender, std::string(1, '\0') + "c");
  // What somebody without the new key might say instead of c: the right nonce, the old key.
  CipherState old = cipher();
  old.set_nonce(2);
  const std::string forged = record(old, std::string(1, '\0') + "c");

  const auto after = [&](const std::vector<std::string>& said, const std::string& next) {
    FrameOpener opener(cipher());
    std::vector<std::string> frames;
    for (const std::string& data : said) REQUIRE(opener.open(bytes_of(data), 10, frames).ok());
    REQUIRE(frames.size() == said.size());
    const absl::StatusCode code = opener.open(bytes_of(next), 10, frames).code();
    CHECK(frames.size() == said.size() + (code == absl::StatusCode::kOk ? 1 : 0));
    return code;
  };
  CHECK(after({a, b}, c) == absl::StatusCode::kOk);
  CHECK(after({a, b}, a) == absl::StatusCode::kDataLoss);
  CHECK(after({a, b}, b) == absl::StatusCode::kDataLoss);
  CHECK(after({a, b}, forged) == absl::StatusCode::kDataLoss);
  CHECK(after({a}, c) == absl::StatusCode::kDataLoss);
  CHECK(after({}, b) == absl::StatusCode::kDataLoss);
  CHECK(after({a, b, c}, c) == absl::StatusCode::kDataLoss);
}

TEST_CASE("the flags of a record are the documented ones") {
  const SecretBytes<32> key = random_key();
  const auto open = [&](const std::string& plaintext, std::vector<std::string>& frames) {
    CipherState sender(CipherSuite::kChaChaPoly, key.copy());
    FrameOpener opener(CipherState(CipherSuite::kChaChaPoly, key.copy()));
    return opener.open(bytes_of(record(sender, plaintext)), kNoiseMaxPayload, frames).code();
  };
  std::vector<std::string> frames;
  for (int flags = 0; flags < 256; ++flags) {
    CAPTURE(flags);
    const std::string flag(1, static_cast<char>(flags));
    // "More follows" needs a full piece; nothing else is known.
    const bool full_ok = flags <= (kMore | kRekey);
    const bool short_ok = full_ok && (flags & kMore) == 0;
    CHECK(open(flag + std::string(kMaxPiece, 'x'), frames) ==
          (full_ok ? absl::StatusCode::kOk : absl::StatusCode::kDataLoss));
    CHECK(open(flag + "rest", frames) ==
          (short_ok ? absl::StatusCode::kOk : absl::StatusCode::kDataLoss));
  }
  CHECK(frames.size() == 4);
}

TEST_CASE("a link and its server replace their keys while they work") {
  Rig rig;
  SECTION("both by bytes") {
    rig.options.rekey.bytes = 5000;
    rig.server_options.rekey.bytes = 3000;
  }
  SECTION("the client with every record, the server never") {
    rig.options.rekey.age = Clock::duration::zero();
  }
  SECTION("the server with every record, the client never") {
    rig.server_options.rekey.age = Clock::duration::zero();
  }
  rig.start();
  const auto link = rig.connect();
  Talk talk(*link, 96, WireDtype::kF32);
  for (std::uint32_t i = 0; i < 300; ++i) {
    // 600 rows are 230 KB: a key ends within the frame.
    const bool large = i % 50 == 0;
    const absl::Status status = talk.step(large ? 0 : 600 + i, large ? 600 : 1, Wanted::kAll);
    INFO(i << " " << status);
    REQUIRE(status.ok());
    if (large) REQUIRE(talk.step(600, i + 1, Wanted::kLast).ok());
  }
}

}  // namespace infemeral
