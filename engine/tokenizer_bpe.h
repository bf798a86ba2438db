// The BPE model of tokenizer.json: from a word to token ids.
#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"

namespace infemeral::tok {

// Immutable.
class Bpe {
 public:
  Bpe(Bpe&&) = default;  // ids_ looks into tokens_: moved with it, never copied
  Bpe& operator=(Bpe&&) = default;

  // Reads the member "model". Throws LoadError.
  static Bpe from_json(const nlohmann::json& document);

  // Buffers that a caller keeps between words: one per thread.
  struct Scratch {
    struct Symbol {
      std::int32_t id;
      std::int32_t previous;  // -1: none
      std::int32_t next;
      bool merged_away;
    };
    struct Candidate {
      std::uint64_t order;  // rank, then position
      std::int32_t new_id;
    };
    std::vector<Symbol> symbols;
    std::vector<Candidate> queue;
  };

  // Appends the ids of `word` (valid UTF-8, below 2 GiB). O(n log n) in its length.
  // FailedPrecondition when an unknown character meets an unk_token that the vocabulary lacks.
  absl::Status encode(std::string_view word, Scratch& scratch,
                      std::vector<std::int32_t>& ids) const;

  // Tokens by id; null where the vocabulary has a gap.
  const std::vector<std::optional<std::string>>& tokens() const { return tokens_; }
  std::optional<std::int32_t> id(std::string_view token) const;
  std::size_t size() const { return ids_.size(); }

 private:
  Bpe() = default;

  struct Merge {
    std::uint32_t rank;
    std::int32_t new_id;
  };

  void read_vocabulary(const nlohmann::json& model);
  void read_merges(const nlohmann::json& model);
  std::int32_t id_of_char(char32_t c) const;
  absl::Status symbols_of(std::string_view word, std::vector<Scratch::Symbol>& symbols) const;
  void merge(Scratch& scratch) const;
  void push_candidate(Scratch& scratch, std::int32_t left, std::int32_t right) const;

  std::vector<std::optional<std::string>> tokens_;
  absl::flat_hash_map<std::string_view, std::int32_t> ids_;  // views into tokens_
  absl::flat_hash_map<std::uint64_t, Merge> merges_;         // by left << 32 | right
  std::array<std::int32_t, 512> low_char_ids_;               // of one-character tokens; -1: none
  absl::flat_hash_map<char32_t, std::int32_t> char_ids_;
  std::array<std::int32_t, 256> byte_ids_;  // of <0x00> to <0xFF>; -1: none
  bool byte_fallback_ = false;
  bool ignore_merges_ = false;
  bool fuse_unk_ = false;
  bool has_unk_ = false;
  std::int32_t unk_id_ = -1;  // -1 with has_unk_: not in the vocabulary
};

}  // namespace infemeral::tok
