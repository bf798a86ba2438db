#include "engine/tokenizer_unicode.h"

#include <utf8proc.h>

#include <algorithm>

namespace infemeral::tok {
namespace {

constexpr CodePointRange kWhiteSpace[] = {
    {0x9, 0xD},       {0x20, 0x20},     {0x85, 0x85},     {0xA0, 0xA0},     {0x1680, 0x1680},
    {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000},
};

// Found by asking Hugging Face's Split(Regex) about every code point and category.
constexpr CategoryRange kSinceUnicode14[] = {
    {0x897, 0x897, {'M', 'n'}},     {0xCF3, 0xCF3, {'M', 'c'}},     {0xECE, 0xECE, {'M', 'n'}},
    {0x1B4E, 0x1B4F, {'P', 'o'}},   {0x1B7F, 0x1B7F, {'P', 'o'}},   {0x1C89, 0x1C89, {'L', 'u'}},
    {0x1C8A, 0x1C8A, {'L', 'l'}},   {0x2427, 0x2429, {'S', 'o'}},   {0x2FFC, 0x2FFF, {'S', 'o'}},
    {0x31E4, 0x31E5, {'S', 'o'}},   {0x31EF, 0x31EF, {'S', 'o'}},   {0xA7CB, 0xA7CC, {'L', 'u'}},
    {0xA7CD, 0xA7CD, {'L', 'l'}},   {0xA7DA, 0xA7DA, {'L', 'u'}},   {0xA7DB, 0xA7DB, {'L', 'l'}},
    {0xA7DC, 0xA7DC, {'L', 'u'}},   {0x105C0, 0x105F3, {'L', 'o'}}, {0x10D40, 0x10D49, {'N', 'd'}},
    {0x10D4A, 0x10D4D, {'L', 'o'}}, {0x10D4E, 0x10D4E, {'L', 'm'}}, {0x10D4F, 0x10D4F, {'L', 'o'}},
    {0x10D50, 0x10D65, {'L', 'u'}}, {0x10D69, 0x10D6D, {'M', 'n'}}, {0x10D6E, 0x10D6E, {'P', 'd'}},
    {0x10D6F, 0x10D6F, {'L', 'm'}}, {0x10D70, 0x10D85, {'L', 'l'}}, {0x10D8E, 0x10D8F, {'S', 'm'}},
    {0x10EC2, 0x10EC4, {'L', 'o'}}, {0x10EFC, 0x10EFF, {'M', 'n'}}, {0x1123F, 0x11240, {'L', 'o'}},
    {0x11241, 0x11241, {'M', 'n'}}, {0x11380, 0x11389, {'L', 'o'}}, {0x1138B, 0x1138B, {'L', 'o'}},
    {0x1138E, 0x1138E, {'L', 'o'}}, {0x11390, 0x113B5, {'L', 'o'}}, {0x113B7, 0x113B7, {'L', 'o'}},
    {0x113B8, 0x113BA, {'M', 'c'}}, {0x113BB, 0x113C0, {'M', 'n'}}, {0x113C2, 0x113C2, {'M', 'c'}},
    {0x113C5, 0x113C5, {'M', 'c'}}, {0x113C7, 0x113CA, {'M', 'c'}}, {0x113CC, 0x113CD, {'M', 'c'}},
    {0x113CE, 0x113CE, {'M', 'n'}}, {0x113CF, 0x113CF, {'M', 'c'}}, {0x113D0, 0x113D0, {'M', 'n'}},
    {0x113D1, 0x113D1, {'L', 'o'}}, {0x113D2, 0x113D2, {'M', 'n'}}, {0x113D3, 0x113D3, {'L', 'o'}},
    {0x113D4, 0x113D5, {'P', 'o'}}, {0x113D7, 0x113D8, {'P', 'o'}}, {0x113E1, 0x113E2, {'M', 'n'}},
    {0x116D0, 0x116E3, {'N', 'd'}}, {0x11B00, 0x11B09, {'P', 'o'}}, {0x11BC0, 0x11BE0, {'L', 'o'}},
    {0x11BE1, 0x11BE1, {'P', 'o'}}, {0x11BF0, 0x11BF9, {'N', 'd'}}, {0x11F00, 0x11F01, {'M', 'n'}},
    {0x11F02, 0x11F02, {'L', 'o'}}, {0x11F03, 0x11F03, {'M', 'c'}}, {0x11F04, 0x11F10, {'L', 'o'}},
    {0x11F12, 0x11F33, {'L', 'o'}}, {0x11F34, 0x11F35, {'M', 'c'}}, {0x11F36, 0x11F3A, {'M', 'n'}},
    {0x11F3E, 0x11F3F, {'M', 'c'}}, {0x11F40, 0x11F40, {'M', 'n'}}, {0x11F41, 0x11F41, {'M', 'c'}},
    {0x11F42, 0x11F42, {'M', 'n'}}, {0x11F43, 0x11F4F, {'P', 'o'}}, {0x11F50, 0x11F59, {'N', 'd'}},
    {0x11F5A, 0x11F5A, {'M', 'n'}}, {0x1342F, 0x1342F, {'L', 'o'}}, {0x13440, 0x13440, {'M', 'n'}},
    {0x13441, 0x13446, {'L', 'o'}}, {0x13447, 0x13455, {'M', 'n'}}, {0x13460, 0x143FA, {'L', 'o'}},
    {0x16100, 0x1611D, {'L', 'o'}}, {0x1611E, 0x16129, {'M', 'n'}}, {0x1612A, 0x1612C, {'M', 'c'}},
    {0x1612D, 0x1612F, {'M', 'n'}}, {0x16130, 0x16139, {'N', 'd'}}, {0x16D40, 0x16D42, {'L', 'm'}},
    {0x16D43, 0x16D6A, {'L', 'o'}}, {0x16D6B, 0x16D6C, {'L', 'm'}}, {0x16D6D, 0x16D6F, {'P', 'o'}},
    {0x16D70, 0x16D79, {'N', 'd'}}, {0x18CFF, 0x18CFF, {'L', 'o'}}, {0x1B132, 0x1B132, {'L', 'o'}},
    {0x1B155, 0x1B155, {'L', 'o'}}, {0x1CC00, 0x1CCEF, {'S', 'o'}}, {0x1CCF0, 0x1CCF9, {'N', 'd'}},
    {0x1CD00, 0x1CEB3, {'S', 'o'}}, {0x1D2C0, 0x1D2D3, {'N', 'o'}}, {0x1DF25, 0x1DF2A, {'L', 'l'}},
    {0x1E030, 0x1E06D, {'L', 'm'}}, {0x1E08F, 0x1E08F, {'M', 'n'}}, {0x1E4D0, 0x1E4EA, {'L', 'o'}},
    {0x1E4EB, 0x1E4EB, {'L', 'm'}}, {0x1E4EC, 0x1E4EF, {'M', 'n'}}, {0x1E4F0, 0x1E4F9, {'N', 'd'}},
    {0x1E5D0, 0x1E5ED, {'L', 'o'}}, {0x1E5EE, 0x1E5EF, {'M', 'n'}}, {0x1E5F0, 0x1E5F0, {'L', 'o'}},
    {0x1E5F1, 0x1E5FA, {'N', 'd'}}, {0x1E5FF, 0x1E5FF, {'P', 'o'}}, {0x1F6DC, 0x1F6DC, {'S', 'o'}},
    {0x1F774, 0x1F776, {'S', 'o'}}, {0x1F77B, 0x1F77F, {'S', 'o'}}, {0x1F7D9, 0x1F7D9, {'S', 'o'}},
    {0x1F8B2, 0x1F8BB, {'S', 'o'}}, {0x1F8C0, 0x1F8C1, {'S', 'o'}}, {0x1FA75, 0x1FA77, {'S', 'o'}},
    {0x1FA87, 0x1FA89, {'S', 'o'}}, {0x1FA8F, 0x1FA8F, {'S', 'o'}}, {0x1FAAD, 0x1FAAF, {'S', 'o'}},
    {0x1FABB, 0x1FABF, {'S', 'o'}}, {0x1FAC6, 0x1FAC6, {'S', 'o'}}, {0x1FACE, 0x1FACF, {'S', 'o'}},
    {0x1FADA, 0x1FADC, {'S', 'o'}}, {0x1FADF, 0x1FADF, {'S', 'o'}}, {0x1FAE8, 0x1FAE9, {'S', 'o'}},
    {0x1FAF7, 0x1FAF8, {'S', 'o'}}, {0x1FBCB, 0x1FBEF, {'S', 'o'}}, {0x2B739, 0x2B739, {'L', 'o'}},
    {0x2EBF0, 0x2EE5D, {'L', 'o'}}, {0x31350, 0x323AF, {'L', 'o'}},
};

// The digits that Unicode 17 added.
constexpr CodePointRange kNumericSinceUnicode16[] = {{0x11DE0, 0x11DE9}, {0x16FF4, 0x16FF6}};

// Other_Alphabetic outside the categories L, M and N.
constexpr CodePointRange kAlphabeticSymbols[] = {
    {0x24B6, 0x24E9}, {0x1F130, 0x1F149}, {0x1F150, 0x1F169}, {0x1F170, 0x1F189}};

// Marks with a combining class, characters with a decomposition, and one with a composition
// (U+11930), of up to Unicode 14 that Hugging Face's NFC, NFD, NFKC and NFKD leave alone. Found by
// normalising every code point, alone and beside a mark, with both.
constexpr CodePointRange kUnknownToNormalizer[] = {
    {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},
    {0xC3C, 0xC3C},     {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},
    {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0x32FF, 0x32FF},   {0xA7F2, 0xA7F4},
    {0xA82C, 0xA82C},   {0xAB69, 0xAB69},   {0x10781, 0x10785}, {0x10787, 0x107B0},
    {0x107B2, 0x107BA}, {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10F46, 0x10F50},
    {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E},
    {0x11839, 0x1183A}, {0x11930, 0x11930}, {0x11938, 0x11938}, {0x1193D, 0x1193E},
    {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47},
    {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
    {0x16FF0, 0x16FF1}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF},
    {0x1F16C, 0x1F16C}, {0x1FBF0, 0x1FBF9}};

// The entry that holds c in a sorted table of ranges, or null.
template <typename Range, std::size_t n>
const Range* find_range(const Range (&table)[n], char32_t c) {
  const Range* it = std::upper_bound(
      table, table + n, c, [](char32_t x, const Range& range) { return x < range.first; });
  return it != table && c <= it[-1].last ? it - 1 : nullptr;
}

}  // namespace

std::span<const CodePointRange> white_space_ranges() {
  return kWhiteSpace;
}
std::span<const CategoryRange> categories_since_unicode_14() {
  return kSinceUnicode14;
}

bool is_white_space(char32_t c) {
  return find_range(kWhiteSpace, c) != nullptr;
}

bool is_numeric(char32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  if (const CategoryRange* range = find_range(kSinceUnicode14, c)) return range->category[0] == 'N';
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      return true;
    default:
      return find_range(kNumericSinceUnicode16, c) != nullptr;
  }
}

bool is_word(char32_t c) {
  if (c == 0x200C || c == 0x200D || find_range(kAlphabeticSymbols, c)) return true;
  if (const CategoryRange* range = find_range(kSinceUnicode14, c)) {
    const char major = range->category[0];
    return major == 'L' || major == 'M' || (major == 'N' && range->category[1] != 'o');
  }
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return false;
  }
}

bool is_unknown_to_normalizer(char32_t c) {
  return find_range(kUnknownToNormalizer, c) != nullptr ||
         find_range(kSinceUnicode14, c) != nullptr;
}

char32_t next_char(std::string_view s, std::size_t& pos) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(s[pos + i]); };
  const char32_t lead = byte(0);
  const auto tail = [&](std::size_t i) { return static_cast<char32_t>(byte(i) & 0x3F); };
  if (lead < 0x80) {
    pos += 1;
    return lead;
  }
  if (lead < 0xE0) {
    const char32_t c = (lead & 0x1F) << 6 | tail(1);
    pos += 2;
    return c;
  }
  if (lead < 0xF0) {
    const char32_t c = (lead & 0x0F) << 12 | tail(1) << 6 | tail(2);
    pos += 3;
    return c;
  }
  const char32_t c = (lead & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3);
  pos += 4;
  return c;
}

void append_utf8(std::string& out, char32_t c) {
  if (c < 0x80) {
    out.push_back(static_cast<char>(c));
  } else if (c < 0x800) {
    out.push_back(static_cast<char>(0xC0 | c >> 6));
    out.push_back(static_cast<char>(0x80 | (c & 0x3F)));
  } else if (c < 0x10000) {
    out.push_back(static_cast<char>(0xE0 | c >> 12));
    out.push_back(static_cast<char>(0x80 | (c >> 6 & 0x3F)));
    out.push_back(static_cast<char>(0x80 | (c & 0x3F)));
  } else {
    out.push_back(static_cast<char>(0xF0 | c >> 18));
    out.push_back(static_cast<char>(0x80 | (c >> 12 & 0x3F)));
    out.push_back(static_cast<char>(0x80 | (c >> 6 & 0x3F)));
    out.push_back(static_cast<char>(0x80 | (c & 0x3F)));
  }
}

// The byte ranges are those of table 3-7 in the Unicode Standard, "Well-Formed UTF-8 Byte
// Sequences".
void Utf8Repair::push(std::string_view bytes, std::string& out) {
  constexpr std::string_view kReplacement = "\xEF\xBF\xBD";
  for (std::size_t i = 0; i < bytes.size();) {
    const auto byte = static_cast<unsigned char>(bytes[i]);
    if (missing_ > 0) {
      if (byte >= low_ && byte <= high_) {
        pending_.push_back(bytes[i++]);
        low_ = 0x80;
        high_ = 0xBF;
        if (--missing_ == 0) {
          out += pending_;
          pending_.clear();
        }
      } else {  // this byte starts something new
        out += kReplacement;
        pending_.clear();
        missing_ = 0;
      }
      continue;
    }
    if (byte < 0x80) {
      std::size_t end = i + 1;
      while (end < bytes.size() && static_cast<unsigned char>(bytes[end]) < 0x80) ++end;
      out.append(bytes, i, end - i);
      i = end;
      continue;
    }
    ++i;
    if (byte < 0xC2 || byte > 0xF4) {
      out += kReplacement;
      continue;
    }
    missing_ = byte < 0xE0 ? 1 : byte < 0xF0 ? 2 : 3;
    low_ = byte == 0xE0 ? 0xA0 : byte == 0xF0 ? 0x90 : 0x80;
    high_ = byte == 0xED ? 0x9F : byte == 0xF4 ? 0x8F : 0xBF;
    pending_.assign(1, static_cast<char>(byte));
  }
}

void Utf8Repair::finish(std::string& out) {
  if (missing_ > 0) out += "\xEF\xBF\xBD";
  pending_.clear();
  missing_ = 0;
}

}  // namespace infemeral::tok
