#include "engine/tokenizer.h"

#include <algorithm>
#include <exception>
#include <new>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "engine/tokenizer_added.h"
#include "engine/tokenizer_bpe.h"
#include "engine/tokenizer_decoder.h"
#include "engine/tokenizer_json.h"
#include "engine/tokenizer_normalizer.h"
#include "engine/tokenizer_pretokenizer.h"
#include "engine/tokenizer_unicode.h"

namespace infemeral {

using tok::AddedPiece;
using tok::AddedToken;
using tok::invalid;
using tok::MarkedText;
using tok::shown;
using tok::unsupported;

namespace {

constexpr std::size_t kMaxTextBytes = std::size_t{512} << 20;  // positions are 32 bits
constexpr std::size_t kMaxAddedTokenBytes = 512;
constexpr std::size_t kMaxAddedTokens = 100'000;

// What a post-processor puts around the text's ids.
struct Template {
  std::vector<std::int32_t> before;
  std::vector<std::int32_t> after;
};

// TemplateProcessing for one text; ByteLevel as a post-processor moves offsets only.
Template read_template(const nlohmann::json& document) {
  Template result;
  bool seen = false;
  for (const tok::Component& part : tok::components(document, "post_processor", "processors")) {
    if (part.type == "ByteLevel") continue;
    if (part.type != "TemplateProcessing") {
      unsupported(part.where, absl::StrCat("type ", shown(part.type)));
    }
    if (std::exchange(seen, true)) unsupported(part.where, "a second TemplateProcessing");
    const nlohmann::json& single = tok::member(*part.object, "single", part.where);
    if (!single.is_array()) invalid(part.where, "single is not a list");
    bool after_text = false;
    for (const nlohmann::json& piece : single) {
      if (!tok::is_null(piece, "Sequence")) {
        const nlohmann::json& sequence = piece["Sequence"];
        if (after_text || tok::string_member(sequence, "id", part.where) != "A") {
          unsupported(part.where, "a template with other than one sequence A");
        }
        after_text = true;
        continue;
      }
      const nlohmann::json& token = tok::member(piece, "SpecialToken", part.where);
      const std::string name = tok::string_member(token, "id", part.where);
      const nlohmann::json& tokens = tok::member(*part.object, "special_tokens", part.where);
      const nlohmann::json& ids =
          tok::member(tok::member(tokens, name.c_str(), part.where), "ids", part.where);
      if (!ids.is_array()) invalid(part.where, "ids is not a list");
      for (const nlohmann::json& id : ids) {
        if (!id.is_number_unsigned() || id.get<std::uint64_t>() > 0x7FFFFFFF) {
          invalid(part.where, absl::StrCat("an id of ", shown(name), " is not a token id"));
        }
        (after_text ? result.after : result.before).push_back(id.get<std::int32_t>());
      }
    }
    if (!after_text) unsupported(part.where, "a template without the sequence A");
  }
  return result;
}

AddedToken read_added_token(const nlohmann::json& entry, const std::string& where) {
  AddedToken token;
  token.content = tok::string_member(entry, "content", where);
  token.decoded = token.content;
  const std::size_t id = tok::count_member(entry, "id", where);
  if (id > 0x7FFFFFFE) invalid(where, absl::StrCat("the id ", id, " is out of range"));
  token.id = static_cast<std::int32_t>(id);
  token.special = tok::bool_member(entry, "special", false, where);
  token.normalized = tok::bool_member(entry, "normalized", !token.special, where);
  token.single_word = tok::bool_member(entry, "single_word", false, where);
  token.lstrip = tok::bool_member(entry, "lstrip", false, where);
  token.rstrip = tok::bool_member(entry, "rstrip", false, where);
  if (token.content.size() > kMaxAddedTokenBytes) {
    unsupported(where, absl::StrCat("an added token longer than ", kMaxAddedTokenBytes, " bytes"));
  }
  return token;
}

bool same(const AddedToken& a, const AddedToken& b) {
  return a.content == b.content && a.id == b.id && a.special == b.special &&
         a.normalized == b.normalized && a.single_word == b.single_word && a.lstrip == b.lstrip &&
         a.rstrip == b.rstrip;
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(const nlohmann::json& document);

  void read_added_tokens(const nlohmann::json& document);
  absl::Status encode(const MarkedText& text, bool add_special_tokens,
                      std::vector<std::int32_t>& ids) const;
  // The token of an id, or null.
  const std::string* token(std::int32_t id) const;
  bool is_special(std::int32_t id) const;

  tok::Bpe model;
  tok::Normalizer normalizer;
  tok::PreTokenizer pre_tokenizer;
  tok::Decoder decoder;
  Template post_processor;
  absl::flat_hash_map<std::int32_t, AddedToken> added;  // by id
  absl::flat_hash_map<std::string, std::int32_t> added_ids;
  tok::AddedTokenMatcher raw_matcher;         // on the text as it comes
  tok::AddedTokenMatcher normalized_matcher;  // on the normalised text
  std::size_t vocab_size = 0;
};

Tokenizer::Impl::Impl(const nlohmann::json& document)
    : model(tok::Bpe::from_json(document)),
      normalizer(tok::Normalizer::from_json(document)),
      pre_tokenizer(tok::PreTokenizer::from_json(document)),
      decoder(tok::Decoder::from_json(document)),
      post_processor(read_template(document)) {
  read_added_tokens(document);
  vocab_size = model.tokens().size();
  while (vocab_size > 0 && !model.tokens()[vocab_size - 1].has_value()) --vocab_size;
  for (const auto& [id, token] : added) {
    vocab_size = std::max(vocab_size, static_cast<std::size_t>(id) + 1);
  }
  for (const auto* ids : {&post_processor.before, &post_processor.after}) {
    for (const std::int32_t id : *ids) {
      if (token(id) == nullptr) {
        invalid("post_processor", absl::StrCat("the id ", id, " is not in the vocabulary"));
      }
    }
  }
}

// Hugging Face gives an added token the id that its content has in the vocabulary, else the next
// free one, whatever the file says. A file that says something else was trained with other ids than
// Hugging Face would use: refused, since either choice may be wrong.
void Tokenizer::Impl::read_added_tokens(const nlohmann::json& document) {
  if (tok::is_null(document, "added_tokens")) return;
  const nlohmann::json& list = *document.find("added_tokens");
  if (!list.is_array()) invalid("added_tokens", "not a list");
  if (list.size() > kMaxAddedTokens) unsupported("added_tokens", "more than 100000 added tokens");
  auto next_id = static_cast<std::int32_t>(model.size());
  std::vector<const AddedToken*> order;  // special ones first, as in Hugging Face's search
  std::vector<std::int32_t> ids;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const std::string where = absl::StrCat("added_tokens[", i, "]");
    AddedToken token = read_added_token(list[i], where);
    if (token.content.empty()) continue;
    const auto known = added_ids.find(token.content);
    if (known != added_ids.end()) {
      if (!same(added.at(known->second), token)) {
        invalid(where, absl::StrCat(shown(token.content), " is listed twice, differently"));
      }
      continue;
    }
    const std::int32_t expected = model.id(token.content).value_or(next_id);
    if (expected != token.id) {
      invalid(where, absl::StrCat(shown(token.content), " has the id ", token.id,
                                  " where the vocabulary makes it ", expected));
    }
    next_id = std::max(next_id, token.id + 1);
    added_ids.emplace(token.content, token.id);
    ids.push_back(token.id);
    added.emplace(token.id, std::move(token));
  }
  for (const bool special : {true, false}) {
    for (const std::int32_t id : ids) {
      AddedToken& token = added.at(id);
      if (token.special != special) continue;
      if (!token.normalized) {
        raw_matcher.add(token, token.content);
        continue;
      }
      MarkedText pattern{token.content, std::string(token.content.size(), MarkedText::kTrusted)};
      normalizer.apply(pattern);
      if (pattern.bytes.empty()) {
        unsupported("added_tokens",
                    absl::StrCat(shown(token.content), ", which normalises to nothing,"));
      }
      normalized_matcher.add(token, pattern.bytes);
      token.decoded = std::move(pattern.bytes);
    }
  }
}

const std::string* Tokenizer::Impl::token(std::int32_t id) const {
  if (const auto it = added.find(id); it != added.end()) return &it->second.decoded;
  const auto index = static_cast<std::size_t>(id);
  if (id < 0 || index >= model.tokens().size() || !model.tokens()[index].has_value())
    return nullptr;
  return &*model.tokens()[index];
}

bool Tokenizer::Impl::is_special(std::int32_t id) const {
  const auto it = added.find(id);
  return it != added.end() && it->second.special;
}

absl::Status Tokenizer::Impl::encode(const MarkedText& text, bool add_special_tokens,
                                     std::vector<std::int32_t>& ids) const {
  if (add_special_tokens) ids = post_processor.before;
  tok::PreTokenizer::Scratch split_scratch;
  tok::Bpe::Scratch bpe_scratch;
  const auto encode_word = [&](std::string_view word) {
    return model.encode(word, bpe_scratch, ids);
  };
  std::vector<AddedPiece> pieces, inner;
  raw_matcher.split(text.bytes, text.marks, pieces);
  MarkedText normalized;
  for (const AddedPiece& piece : pieces) {
    if (piece.id >= 0) {
      ids.push_back(piece.id);
      continue;
    }
    const std::size_t length = piece.end - piece.begin;
    std::string_view bytes = std::string_view(text.bytes).substr(piece.begin, length);
    std::string_view marks = std::string_view(text.marks).substr(piece.begin, length);
    if (!normalizer.empty()) {
      normalized.bytes = bytes;
      normalized.marks = marks;
      normalizer.apply(normalized);
      bytes = normalized.bytes;
      marks = normalized.marks;
    }
    inner.clear();
    normalized_matcher.split(bytes, marks, inner);
    for (const AddedPiece& part : inner) {
      if (part.id >= 0) {
        ids.push_back(part.id);
        continue;
      }
      absl::Status status =
          pre_tokenizer.split(bytes.substr(part.begin, part.end - part.begin),
                              piece.begin == 0 && part.begin == 0, split_scratch, encode_word);
      if (!status.ok()) return status;
    }
  }
  if (add_special_tokens) {
    ids.insert(ids.end(), post_processor.after.begin(), post_processor.after.end());
  }
  return absl::OkStatus();
}

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<const Tokenizer>> Tokenizer::parse(std::string_view json) {
  try {
    auto impl = std::make_unique<const Impl>(tok::parse_document(json));
    return std::unique_ptr<const Tokenizer>(new Tokenizer(std::move(impl)));
  } catch (const tok::LoadError& error) {
    return error.status();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("out of memory while reading a tokenizer.json");
  } catch (const std::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat("not a tokenizer.json: ", error.what()));
  }
}

absl::StatusOr<std::unique_ptr<const Tokenizer>> Tokenizer::load(
    const std::filesystem::path& tokenizer_json) {
  const absl::StatusOr<std::string> text = tok::read_document(tokenizer_json);
  if (!text.ok()) return text.status();
  auto tokenizer = parse(*text);
  if (!tokenizer.ok()) {
    return absl::Status(tokenizer.status().code(),
                        absl::StrCat(tokenizer_json.string(), ": ", tokenizer.status().message()));
  }
  return tokenizer;
}

std::size_t Tokenizer::vocab_size() const {
  return impl_->vocab_size;
}

absl::StatusOr<std::vector<std::int32_t>> Tokenizer::encode(std::string_view text,
                                                            EncodeOptions options) const {
  const Segment segment{text, options.parse_special};
  return encode_segments({&segment, 1}, options.add_special_tokens);
}

absl::StatusOr<std::vector<std::int32_t>> Tokenizer::encode_segments(
    std::span<const Segment> segments, bool add_special_tokens) const {
  std::size_t total = 0;
  for (const Segment& segment : segments) {
    if (segment.text.size() > kMaxTextBytes - total) {
      return absl::ResourceExhaustedError("the text to tokenise is longer than 512 MiB");
    }
    total += segment.text.size();
  }
  try {
    MarkedText text;
    text.bytes.reserve(total);
    for (const Segment& segment : segments) {
      tok::Utf8Repair repair;
      repair.push(segment.text, text.bytes);
      repair.finish(text.bytes);
      text.marks.resize(text.bytes.size(),
                        segment.parse_special ? MarkedText::kTrusted : MarkedText::kUntrusted);
    }
    std::vector<std::int32_t> ids;
    absl::Status status = impl_->encode(text, add_special_tokens, ids);
    if (!status.ok()) return status;
    return ids;
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("out of memory while tokenising a text");
  }
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special_tokens) const {
  StreamDecoder decoder(*this, skip_special_tokens);
  std::string text;
  for (const std::int32_t id : ids) text += decoder.push(id);
  return text += decoder.finish();
}

std::optional<std::int32_t> Tokenizer::token_id(std::string_view content) const {
  if (const auto it = impl_->added_ids.find(std::string(content)); it != impl_->added_ids.end()) {
    return it->second;
  }
  return impl_->model.id(content);
}

bool Tokenizer::is_special(std::int32_t id) const {
  return impl_->is_special(id);
}

struct StreamDecoder::State {
  const Tokenizer::Impl* tokenizer;
  bool skip_special_tokens;
  tok::DecoderState decoder;
};

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens)
    : state_(std::make_unique<State>(State{tokenizer.impl_.get(), skip_special_tokens,
                                           tok::DecoderState(tokenizer.impl_->decoder)})) {}
StreamDecoder::~StreamDecoder() = default;
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder& StreamDecoder::operator=(StreamDecoder&&) noexcept = default;

std::string StreamDecoder::push(std::int32_t id) {
  std::string out;
  const std::string* token = state_->tokenizer->token(id);
  if (token == nullptr) return out;
  if (state_->skip_special_tokens && state_->tokenizer->is_special(id)) return out;
  state_->decoder.push(*token, out);
  return out;
}

std::string StreamDecoder::finish() {
  std::string out;
  state_->decoder.finish(out);
  return out;
}

}  // namespace infemeral
