// Frames in records in envelopes: cut, grouped, damaged and put together again. The input is a list
// of operations, the keys are the fuzzer's own; what must come out is told by a few lines that
// follow docs/protocol.md and know the plaintexts.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "net/bytes.h"
#include "net/channel.h"

namespace {

using namespace infemeral;
constexpr CipherSuite kSuite = CipherSuite::kChaChaPoly;
constexpr std::size_t kMaxFrame = 150'000;     // three records
constexpr std::uint8_t kMore = 1, kRekey = 2;  // a record's flags
// Encryption takes the time: 256 KiB of an input are enough for anything.
constexpr std::size_t kMaxTotal = 256 * 1024;

void check(bool holds) {
  if (!holds) std::abort();
}

CipherState cipher() {
  SecretKey key;
  std::memset(key.data(), 5, key.size());
  return CipherState(kSuite, std::move(key));
}

struct Record {
  std::string bytes;      // with its length
  std::string plaintext;  // flags and piece
};

class Run {
 public:
  // A frame as the product seals it.
  void seal(std::size_t size, std::uint8_t fill) {
    size = limited(size);
    if (size == 0) return;
    const std::string frame(size, static_cast<char>(fill));
    std::size_t at = 0;
    for (auto rest = bytes_of(frame); !rest.empty();) {
      std::string data;
      check(sealer_->seal(rest, data).ok());
      check(data.size() <= kRecordsPerEnvelope * (2 + kNoiseMaxMessage));
      // Cut at the lengths, which are in the clear.
      for (std::size_t from = 0; from < data.size();) {
        const std::size_t length = static_cast<std::size_t>(static_cast<std::uint8_t>(data[from]))
                                       << 8 |
                                   static_cast<std::uint8_t>(data[from + 1]);
        const std::size_t piece = length - kNoiseTagSize - 1;
        const bool last = at + piece == size;
        check(last || piece == kMaxPiece);
        add({.bytes = data.substr(from, 2 + length),
             .plaintext = std::string(1, last ? 0 : 1) + frame.substr(at, piece)});
        at += piece;
        from += 2 + length;
      }
    }
    check(at == size);
  }

  // A record with any plaintext, in the sealer's stead. The next ones have the next key where its
  // flags say so.
  void craft(std::uint8_t flags, std::size_t size) {
    Record record{.plaintext =
                      std::string(1, static_cast<char>(flags)) + std::string(limited(size), 'p')};
    CipherState state = cipher();
    for (int i = 0; i < rekeys_; ++i) state.rekey();
    state.set_nonce(sealed_.size());
    std::string message;
    check(state.encrypt({}, bytes_of(record.plaintext), message).ok());
    record.bytes = {static_cast<char>(message.size() >> 8), static_cast<char>(message.size())};
    record.bytes += message;
    if ((flags & kRekey) != 0) {
      state.rekey();
      ++rekeys_;
    }
    add(std::move(record));
    state.set_nonce(sealed_.size());
    sealer_.emplace(std::move(state));
  }

  void damage(std::uint8_t how, std::size_t at, std::uint8_t with) {
    if (underway_.empty()) return;
    std::string& bytes = underway_[at % underway_.size()];
    switch (how % 5) {
      case 0:
        if (bytes.empty()) break;
        bytes[at % bytes.size()] ^= static_cast<char>(with);
        break;
      case 1:
        if (bytes.empty()) break;
        bytes.resize(bytes.size() - 1 - at % bytes.size());
        break;
      case 2:
        std::swap(bytes, underway_.back());
        break;
      case 3:
        if (underway_.size() < 64) underway_.push_back(bytes);
        break;
      default:
        underway_.pop_front();
        break;
    }
  }

  // The next `count` records in one envelope. The bytes that arrive are the truth: a cut may be
  // filled by what follows, and a flip taken back by another.
  void deliver(std::size_t count) {
    count = std::min(count, underway_.size());
    std::string data;
    for (; count > 0; --count) {
      data += underway_.front();
      underway_.pop_front();
    }
    std::vector<std::string> expected;
    bool good = !data.empty();
    for (std::size_t at = 0; good && at < data.size();) {
      good = opened_ < sealed_.size() &&
             data.compare(at, sealed_[opened_].bytes.size(), sealed_[opened_].bytes) == 0;
      if (!good) break;
      at += sealed_[opened_].bytes.size();
      good = follow(sealed_[opened_++].plaintext, expected);
    }
    std::vector<std::string> frames;
    const absl::Status status = opener_.open(bytes_of(data), kMaxFrame, frames);
    check(status.ok() == good);
    check(frames == expected);  // also what was complete before a fault
    ended_ = !good;
    if (!good) {
      check(status.code() == absl::StatusCode::kDataLoss ||
            status.code() == absl::StatusCode::kResourceExhausted);
    }
  }

  bool ended() const { return ended_; }

 private:
  std::size_t limited(std::size_t size) {
    size = std::min(size, kMaxTotal - total_);
    total_ += size;
    return size;
  }

  void add(Record record) {
    underway_.push_back(record.bytes);
    sealed_.push_back(std::move(record));
  }

  // One record by the protocol's text.
  bool follow(const std::string& plaintext, std::vector<std::string>& frames) {
    const auto flags = static_cast<std::uint8_t>(plaintext[0]);
    const bool more = (flags & kMore) != 0;
    if ((flags & ~(kMore | kRekey)) != 0) return false;
    if (more && plaintext.size() != 1 + kMaxPiece) return false;
    frame_ += plaintext.substr(1);
    if (frame_.size() > kMaxFrame) return false;
    if (!more) frames.push_back(std::exchange(frame_, {}));
    return true;
  }

  int rekeys_ = 0;
  std::optional<FrameSealer> sealer_{cipher()};
  FrameOpener opener_{cipher()};
  std::vector<Record> sealed_;        // in the order of encryption, as they were
  std::deque<std::string> underway_;  // not delivered, perhaps damaged
  std::size_t opened_ = 0;
  std::size_t total_ = 0;
  std::string frame_;
  bool ended_ = false;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::uint8_t* const end = data + size;
  const auto byte = [&]() -> std::uint8_t { return data < end ? *data++ : 0; };
  Run run;
  while (data < end && !run.ended()) {
    const std::uint8_t op = byte();
    const std::uint8_t first = op % 8 < 5 ? byte() : 0;
    switch (op % 8) {
      case 0:
        run.seal(first, byte());
        break;
      case 1:
        // Around the border of one, two or three records.
        run.seal((1 + op / 8 % 3) * kMaxPiece - 4 + first % 9, byte());
        break;
      case 2:
        run.craft(first, byte());
        break;
      case 3:
        run.craft(first, kMaxPiece - byte() % 3);
        break;
      case 4:
        run.damage(op / 8, first, byte());
        break;
      default:
        run.deliver(op / 8 % 8);
        break;
    }
  }
  return 0;
}
