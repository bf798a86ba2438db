// Answers encode and decode requests from standard input, for parity.py:
//
//   tokenizer_driver TOKENIZER_JSON < requests > answers
//
// Numbers are little-endian, u32 unless said otherwise.
//   request  'E' u8 add_special u8 parse_special  length bytes             encode
//            'S' u8 add_special  count { u8 parse_special length bytes }    encode_segments
//            'D' u8 skip_special  count ids                                 decode
//   answer   u8 1  count ids  (E, S)  |  u8 1  length bytes  (D)  |  u8 0  length message
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

#include "engine/tokenizer.h"

static_assert(std::endian::native == std::endian::little);

namespace {

using infemeral::Tokenizer;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "tokenizer_driver: %s\n", what);
  std::exit(2);
}

void read_bytes(void* out, std::size_t n) {
  if (n > 0 && std::fread(out, 1, n, stdin) != n) fail("the input ends inside a request");
}

template <typename T>
T read() {
  T value;
  read_bytes(&value, sizeof(value));
  return value;
}

std::string read_text() {
  std::string text(read<std::uint32_t>(), '\0');
  read_bytes(text.data(), text.size());
  return text;
}

void write_answer(bool ok, const void* data, std::size_t count, std::size_t item_size) {
  const auto n = static_cast<std::uint32_t>(count);
  const std::uint8_t flag = ok ? 1 : 0;
  if (std::fwrite(&flag, 1, 1, stdout) != 1 || std::fwrite(&n, 4, 1, stdout) != 1 ||
      std::fwrite(data, item_size, count, stdout) != count) {
    fail("cannot write an answer");
  }
}

void answer(const absl::StatusOr<std::vector<std::int32_t>>& ids) {
  if (ids.ok()) {
    write_answer(true, ids->data(), ids->size(), sizeof(std::int32_t));
  } else {
    write_answer(false, ids.status().message().data(), ids.status().message().size(), 1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) fail("usage: tokenizer_driver TOKENIZER_JSON < requests > answers");
  const auto tokenizer = Tokenizer::load(argv[1]);
  if (!tokenizer.ok()) fail(std::string(tokenizer.status().message()).c_str());

  for (int kind; (kind = std::getchar()) != EOF;) {
    if (kind == 'E') {
      const bool add_special = read<std::uint8_t>() != 0;
      const bool parse_special = read<std::uint8_t>() != 0;
      const std::string text = read_text();
      answer(
          (*tokenizer)
              ->encode(text, {.add_special_tokens = add_special, .parse_special = parse_special}));
    } else if (kind == 'S') {
      const bool add_special = read<std::uint8_t>() != 0;
      std::vector<std::string> texts(read<std::uint32_t>());
      std::vector<Tokenizer::Segment> segments;
      for (std::string& text : texts) {
        const bool parse_special = read<std::uint8_t>() != 0;
        text = read_text();
        segments.push_back({text, parse_special});
      }
      answer((*tokenizer)->encode_segments(segments, add_special));
    } else if (kind == 'D') {
      const bool skip_special = read<std::uint8_t>() != 0;
      std::vector<std::int32_t> ids(read<std::uint32_t>());
      read_bytes(ids.data(), ids.size() * sizeof(std::int32_t));
      const std::string text = (*tokenizer)->decode(ids, skip_special);
      write_answer(true, text.data(), text.size(), 1);
    } else {
      fail("an unknown kind of request");
    }
  }
  return 0;
}
