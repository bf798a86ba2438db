// Any bytes as a tokenizer.json, and what was accepted put to work.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "engine/chat_template.h"
#include "engine/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace infemeral;
  const std::string_view json(reinterpret_cast<const char*>(data), size);
  if (const auto chat = ChatTemplate::parse(json); chat.ok()) {
    (void)chat->render(std::vector<ChatMessage>{{"user", "x"}, {"assistant", "</think>"}}, true);
  }
  const auto tokenizer = Tokenizer::parse(json);
  if (!tokenizer.ok()) return 0;

  const std::string text =
      "It's <s> a\xCC\x81 \xF0\x9F\x98\x80\xFF 12\n\n  caf\xC3\xA9 <x><|im_end|>";
  std::vector<std::int32_t> ids;
  for (const bool special : {false, true}) {
    const auto encoded =
        (*tokenizer)->encode(text, {.add_special_tokens = special, .parse_special = special});
    if (encoded.ok()) ids.insert(ids.end(), encoded->begin(), encoded->end());
  }
  for (const std::int32_t id : ids) {
    if (id < 0 || static_cast<std::size_t>(id) >= (*tokenizer)->vocab_size()) std::abort();
  }
  ids.insert(ids.end(), {0, 1, 2, -1, 1 << 30});
  (void)(*tokenizer)->decode(ids, false);
  (void)(*tokenizer)->decode(ids, true);
  const std::vector<Tokenizer::Segment> segments = {{"<s>", true}, {text, false}, {"<x>", true}};
  (void)(*tokenizer)->encode_segments(segments, true);
  return 0;
}
