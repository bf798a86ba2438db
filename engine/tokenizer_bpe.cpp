#include "engine/tokenizer_bpe.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/tokenizer_json.h"
#include "engine/tokenizer_unicode.h"

namespace infemeral::tok {
namespace {

constexpr std::string_view kWhere = "model";

std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint32_t>(right);
}

void refuse_affix(const nlohmann::json& model, const char* key) {
  if (is_null(model, key)) return;
  if (!string_member(model, key, kWhere).empty()) unsupported(kWhere, key);
}

}  // namespace

Bpe Bpe::from_json(const nlohmann::json& document) {
  const nlohmann::json& model = member(document, "model", "tokenizer.json");
  if (!model.is_object()) invalid(kWhere, "not an object");
  // Old files have no type; then only BPE has merges.
  if (!is_null(model, "type") && string_member(model, "type", kWhere) != "BPE") {
    unsupported(kWhere, absl::StrCat("type ", shown(string_member(model, "type", kWhere))));
  }
  refuse_affix(model, "continuing_subword_prefix");
  refuse_affix(model, "end_of_word_suffix");
  if (!is_null(model, "dropout")) {
    const nlohmann::json& dropout = model["dropout"];
    if (!dropout.is_number() || dropout.get<double>() != 0) unsupported(kWhere, "dropout");
  }
  Bpe bpe;
  bpe.byte_fallback_ = bool_member(model, "byte_fallback", false, kWhere);
  bpe.ignore_merges_ = bool_member(model, "ignore_merges", false, kWhere);
  bpe.fuse_unk_ = bool_member(model, "fuse_unk", false, kWhere);
  bpe.read_vocabulary(model);
  bpe.read_merges(model);
  if (!is_null(model, "unk_token")) {
    bpe.has_unk_ = true;
    bpe.unk_id_ = bpe.id(string_member(model, "unk_token", kWhere)).value_or(-1);
  }
  return bpe;
}

void Bpe::read_vocabulary(const nlohmann::json& model) {
  const nlohmann::json& vocabulary = member(model, "vocab", kWhere);
  if (!vocabulary.is_object() || vocabulary.empty()) {
    invalid(kWhere, "vocab is not an object with tokens and ids");
  }
  // Real vocabularies have no gaps; the bound keeps a table by id proportional to the file.
  const std::size_t limit = 4 * vocabulary.size() + 65536;
  for (const auto& [token, value] : vocabulary.items()) {
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() >= limit) {
      invalid(kWhere, absl::StrCat("the id of token ", shown(token), " is not a number below ",
                                   limit, " (the vocabulary has ", vocabulary.size(), " tokens)"));
    }
    const auto id = value.get<std::size_t>();
    if (id >= tokens_.size()) tokens_.resize(std::max(id + 1, vocabulary.size()));
    if (tokens_[id].has_value()) {
      invalid(kWhere, absl::StrCat("tokens ", shown(*tokens_[id]), " and ", shown(token),
                                   " have the same id ", id));
    }
    tokens_[id] = token;
  }
  ids_.reserve(vocabulary.size());
  low_char_ids_.fill(-1);
  for (std::size_t id = 0; id < tokens_.size(); ++id) {
    if (!tokens_[id].has_value()) continue;
    const std::string& token = *tokens_[id];
    ids_.emplace(token, static_cast<std::int32_t>(id));
    if (token.empty() || token.size() > 4) continue;
    std::size_t pos = 0;
    const char32_t c = next_char(token, pos);
    if (pos != token.size()) continue;
    if (c < low_char_ids_.size()) {
      low_char_ids_[c] = static_cast<std::int32_t>(id);
    } else {
      char_ids_.emplace(c, static_cast<std::int32_t>(id));
    }
  }
  for (std::size_t byte = 0; byte < 256; ++byte) {
    byte_ids_[byte] = id(absl::StrFormat("<0x%02X>", byte)).value_or(-1);
  }
}

// As "left right" strings, or since 2024 as pairs. A pair that is listed twice has its last rank.
void Bpe::read_merges(const nlohmann::json& model) {
  const nlohmann::json& merges = member(model, "merges", kWhere);
  if (!merges.is_array()) invalid(kWhere, "merges is not a list");
  merges_.reserve(merges.size());
  std::string joined;
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    const nlohmann::json& entry = merges[rank];
    std::string_view left, right;
    if (entry.is_string()) {
      const auto& text = entry.get_ref<const std::string&>();
      const std::size_t space = text.find(' ');
      if (space != std::string::npos && text.find(' ', space + 1) == std::string::npos) {
        left = std::string_view(text).substr(0, space);
        right = std::string_view(text).substr(space + 1);
      }
    } else if (entry.is_array() && entry.size() == 2 && entry[0].is_string() &&
               entry[1].is_string()) {
      left = entry[0].get_ref<const std::string&>();
      right = entry[1].get_ref<const std::string&>();
    }
    if (left.data() == nullptr) {
      invalid(kWhere, absl::StrCat("merges[", rank, "] is not a pair of tokens"));
    }
    joined.assign(left).append(right);
    const auto known = [&](std::string_view token) {
      const std::optional<std::int32_t> found = id(token);
      if (!found) {
        invalid(kWhere, absl::StrCat("merges[", rank, "] needs the token ", shown(token),
                                     ", which the vocabulary lacks"));
      }
      return *found;
    };
    merges_.insert_or_assign(pair_key(known(left), known(right)),
                             Merge{static_cast<std::uint32_t>(rank), known(joined)});
  }
}

std::optional<std::int32_t> Bpe::id(std::string_view token) const {
  const auto it = ids_.find(token);
  return it == ids_.end() ? std::nullopt : std::optional<std::int32_t>(it->second);
}

std::int32_t Bpe::id_of_char(char32_t c) const {
  if (c < low_char_ids_.size()) return low_char_ids_[c];
  const auto it = char_ids_.find(c);
  return it == char_ids_.end() ? -1 : it->second;
}

// The word's characters as tokens. One that the vocabulary lacks becomes its bytes where all of
// them have tokens, else unk, else nothing. A pending unk is written before the next known
// character, not before bytes: Hugging Face's order.
absl::Status Bpe::symbols_of(std::string_view word, std::vector<Scratch::Symbol>& symbols) const {
  symbols.clear();
  const auto add = [&](std::int32_t id) {
    const auto here = static_cast<std::int32_t>(symbols.size());
    symbols.push_back({id, here - 1, here + 1, false});
  };
  bool unk_pending = false;
  for (std::size_t pos = 0; pos < word.size();) {
    const std::size_t begin = pos;
    const std::int32_t id = id_of_char(next_char(word, pos));
    if (id >= 0) {
      if (unk_pending) add(unk_id_);
      unk_pending = false;
      add(id);
      continue;
    }
    const std::string_view bytes = word.substr(begin, pos - begin);
    const auto byte_id = [&](char byte) { return byte_ids_[static_cast<unsigned char>(byte)]; };
    if (byte_fallback_ &&
        std::all_of(bytes.begin(), bytes.end(), [&](char b) { return byte_id(b) >= 0; })) {
      for (char byte : bytes) add(byte_id(byte));
    } else if (has_unk_) {
      if (unk_id_ < 0) {
        return absl::FailedPreconditionError(
            "the text has a character that the tokenizer does not know, and its unk_token is not "
            "in the vocabulary");
      }
      if (unk_pending && !fuse_unk_) add(unk_id_);
      unk_pending = true;
    }
  }
  if (unk_pending) add(unk_id_);
  if (!symbols.empty()) symbols.back().next = -1;
  return absl::OkStatus();
}

namespace {
// A heap with the lowest order on top.
bool later(const Bpe::Scratch::Candidate& a, const Bpe::Scratch::Candidate& b) {
  return a.order > b.order;
}
}  // namespace

void Bpe::push_candidate(Scratch& scratch, std::int32_t left, std::int32_t right) const {
  const auto& symbols = scratch.symbols;
  const auto it = merges_.find(pair_key(symbols[static_cast<std::size_t>(left)].id,
                                        symbols[static_cast<std::size_t>(right)].id));
  if (it == merges_.end()) return;
  scratch.queue.push_back(
      {static_cast<std::uint64_t>(it->second.rank) << 32 | static_cast<std::uint32_t>(left),
       it->second.new_id});
  std::push_heap(scratch.queue.begin(), scratch.queue.end(), later);
}

// Merges the pair of lowest rank, the leftmost of equals, until none is left. Symbols form a linked
// list; a queue entry whose pair has changed since is recognised when it comes up.
void Bpe::merge(Scratch& scratch) const {
  auto& symbols = scratch.symbols;
  auto& queue = scratch.queue;
  queue.clear();
  for (std::size_t i = 1; i < symbols.size(); ++i) {
    push_candidate(scratch, static_cast<std::int32_t>(i - 1), static_cast<std::int32_t>(i));
  }
  while (!queue.empty()) {
    std::pop_heap(queue.begin(), queue.end(), later);
    const Scratch::Candidate top = queue.back();
    queue.pop_back();
    const auto here = static_cast<std::int32_t>(top.order & 0xFFFFFFFF);
    Scratch::Symbol& left = symbols[static_cast<std::size_t>(here)];
    if (left.merged_away || left.next < 0) continue;
    Scratch::Symbol& right = symbols[static_cast<std::size_t>(left.next)];
    const auto it = merges_.find(pair_key(left.id, right.id));
    if (it == merges_.end() || it->second.new_id != top.new_id) continue;

    left.id = top.new_id;
    left.next = right.next;
    right.merged_away = true;
    if (left.next >= 0) symbols[static_cast<std::size_t>(left.next)].previous = here;
    if (left.previous >= 0) push_candidate(scratch, left.previous, here);
    if (left.next >= 0) push_candidate(scratch, here, left.next);
  }
}

absl::Status Bpe::encode(std::string_view word, Scratch& scratch,
                         std::vector<std::int32_t>& ids) const {
  if (ignore_merges_) {
    if (const std::optional<std::int32_t> whole = id(word)) {
      ids.push_back(*whole);
      return absl::OkStatus();
    }
  }
  absl::Status status = symbols_of(word, scratch.symbols);
  if (!status.ok()) return status;
  merge(scratch);
  for (const Scratch::Symbol& symbol : scratch.symbols) {
    if (!symbol.merged_away) ids.push_back(symbol.id);
  }
  return absl::OkStatus();
}

}  // namespace infemeral::tok
