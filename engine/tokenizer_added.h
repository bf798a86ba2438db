// Added tokens: the pieces of text that are found before anything else happens to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace infemeral::tok {

struct AddedToken {
  std::string content;
  std::string decoded;  // what it is decoded to: the content, normalised where that is asked for
  std::int32_t id = 0;
  bool special = false;
  bool normalized = false;   // looked for in the normalised text
  bool single_word = false;  // not beside a word character
  bool lstrip = false;       // takes the white space on its left along
  bool rstrip = false;
};

// A part of a text: an added token (id >= 0), or what is between them (id -1).
struct AddedPiece {
  std::size_t begin;
  std::size_t end;
  std::int32_t id;
};

// Cuts a text at the added tokens: leftmost first, of those the longest (Hugging Face searches with
// Aho-Corasick, leftmost-longest). Immutable once built.
class AddedTokenMatcher {
 public:
  // `pattern` is the token's content, normalised where that is asked for; not empty. Of two tokens
  // with the same pattern the first one wins.
  void add(const AddedToken& token, std::string_view pattern);

  // Appends to `pieces`, in order. `marks` as in MarkedText: special tokens are recognised where
  // every byte of their content is trusted. A special token in untrusted text is passed over as a
  // whole, as Hugging Face's encode_special_tokens does.
  void split(std::string_view text, std::string_view marks, std::vector<AddedPiece>& pieces) const;

 private:
  struct Rule {
    std::int32_t id;
    bool special, single_word, lstrip, rstrip;
    std::size_t prefix;  // bytes of the pattern that normalising put before the content
  };
  struct Match {
    std::size_t end = 0;  // 0: none
    const Rule* rule = nullptr;
    bool as_text = false;
  };
  Match longest_at(std::string_view text, std::string_view marks, std::size_t begin) const;

  std::vector<std::int32_t> rule_at_{-1};  // of the trie's nodes: index in rules_, or -1
  absl::flat_hash_map<std::uint64_t, std::int32_t> edges_;  // node << 8 | byte -> node
  bool first_byte_[256] = {};
  std::vector<Rule> rules_;
};

}  // namespace infemeral::tok
