// Text to token ids and back, equal to Hugging Face's `tokenizers` (checked against 0.23.3, see
// tests/tokenizer_parity).
//
// Reads tokenizer.json with a BPE model: byte-level (GPT-2, Llama 3, Qwen, SmolLM) and with byte
// fallback (Llama 2, Mistral). `truncation` and `padding` in the file are not applied: they belong
// to the caller of Hugging Face's class, which overrides them as a rule.
//
// Input that is not UTF-8: each maximal invalid subpart becomes U+FFFD, as with Python's
// errors="replace", and the result is encoded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace infemeral {

// Immutable: every method may be called from any number of threads at once.
class Tokenizer {
 public:
  // NotFound: no such file; PermissionDenied, DataLoss: it cannot be read. InvalidArgument: not a
  // tokenizer.json, or one that contradicts itself. Unimplemented: a part that this tokenizer does
  // not have, named. ResourceExhausted: over 256 MiB.
  static absl::StatusOr<std::unique_ptr<const Tokenizer>> load(
      const std::filesystem::path& tokenizer_json);
  static absl::StatusOr<std::unique_ptr<const Tokenizer>> parse(std::string_view json);
  ~Tokenizer();

  // The highest id + 1, added tokens included.
  std::size_t vocab_size() const;

  struct EncodeOptions {
    bool add_special_tokens = true;  // what the file's post-processor adds: BOS, EOS
    bool parse_special = false;      // text that reads like a special token becomes that token
  };
  // Added tokens that are not special are recognised always, as Hugging Face does.
  // ResourceExhausted: text over 512 MiB, or the file's regular expression gave up on it.
  // FailedPrecondition: an unknown character, and no unknown token in the vocabulary.
  absl::StatusOr<std::vector<std::int32_t>> encode(std::string_view text,
                                                   EncodeOptions options) const;
  absl::StatusOr<std::vector<std::int32_t>> encode(std::string_view text) const {
    return encode(text, EncodeOptions());
  }

  struct Segment {
    std::string_view text;
    bool parse_special;
  };
  // One text in parts. Special tokens are recognised in the parts that ask for it (across the
  // border of two such parts too), never where a byte of their content comes from another part.
  // Between them the text is tokenised as a whole: where no other part reads like a special token,
  // the ids are those of the joined text with parse_special. A character must not be cut by a
  // border.
  absl::StatusOr<std::vector<std::int32_t>> encode_segments(std::span<const Segment> segments,
                                                            bool add_special_tokens) const;

  // Valid UTF-8; bytes that do not make characters become U+FFFD. Ids that are no tokens are left
  // out. skip_special_tokens leaves out every special token; Hugging Face 0.23 keeps those that the
  // file's normaliser changes (`"normalized": true` in old Llama files).
  std::string decode(std::span<const std::int32_t> ids, bool skip_special_tokens) const;

  std::optional<std::int32_t> token_id(std::string_view content) const;
  bool is_special(std::int32_t id) const;

 private:
  friend class StreamDecoder;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<const Impl> impl);
  std::unique_ptr<const Impl> impl_;
};

// decode() one id at a time: the strings that push and finish return, put together, are what decode
// returns for all the ids. Each is whole UTF-8 (a character that is not complete waits). The
// tokenizer must outlive it; one thread at a time.
class StreamDecoder {
 public:
  StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens);
  ~StreamDecoder();
  StreamDecoder(StreamDecoder&&) noexcept;
  StreamDecoder& operator=(StreamDecoder&&) noexcept;

  std::string push(std::int32_t id);
  std::string finish();  // what is left; the decoder is then as new

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace infemeral
