"""Test strings for the tokenizer: as bytes, since some are not UTF-8."""

import random
import sys
import unicodedata

WHITE_SPACE = [
    "\t", "\n", "\v", "\f", "\r", " ", "\x85", "\xa0", "\u1680", "\u2000", "\u2001", "\u2002",
    "\u2003", "\u2004", "\u2005", "\u2006", "\u2007", "\u2008", "\u2009", "\u200a", "\u2028",
    "\u2029", "\u202f", "\u205f", "\u3000",
]
# Not White_Space, but taken for it by one library or another.
NEARLY_SPACE = ["\x1c", "\x1d", "\x1e", "\x1f", "\u180e", "\u200b", "\u2060", "\ufeff"]

WORDS = (
    "the of and to in is that it was for on are as with his they at be this from I have or by one "
    "had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more her two like him see "
    "tokenisation embedding Rotation antidisestablishmentarianism HTTPServer snake_case camelCase "
    "naïve café Straße Ångström Übergröße façade jalapeño žluťoučký kůň łódź İstanbul ıssız "
    "Привет мир как дела программирование ёлка Київ Ελληνικά γλώσσα μῆνιν ἄειδε "
    "שלום עולם מה שלומך السلام عليكم مرحبا بالعالم سلام دنیا "
    "नमस्ते दुनिया हिन्दी বাংলা ਪੰਜਾਬੀ ગુજરાતી தமிழ் తెలుగు ಕನ್ನಡ മലയാളം සිංහල "
    "ภาษาไทย สวัสดีชาวโลก ລາວ မြန်မာ ភាសាខ្មែរ བོད་སྐད ქართული Հայերեն አማርኛ ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ "
    "你好世界 中文分词 漢字 日本語 ひらがな カタカナ ﾊﾝｶｸ 한국어 안녕하세요 가각힣 "
    "Tiếng Việt Kreyòl Hawaiʻi Yorùbá ሰላም ⵜⴰⵎⴰⵣⵉⵖⵜ 𐌲𐌿𐍄𐌹𐍃𐌺 𒀀𒁀 𓀀𓂀 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ＦＵＬＬ"
).split()

CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'T", "'RE", "'Ve", "'M", "'lL",
                "'D", "’s", "’t", "'ſ", "'\u212a", "'st", "'\ufb06", "''", "'x"]

DIGITS = ["0", "7", "42", "123", "1234567890", "3.14159", "1,000,000", "0x1F", "1e-9", "٣٤٥", "۱۲۳",
          "१२३", "৪৫৬", "๑๒๓", "１２３", "²³¹", "½¾", "Ⅷⅻ", "㊿", "四五", "𝟘𝟙𝟚", "௧௨௰", "𑁦𑁧", "𞥐𞥑",
          "①②", "𐒠𐒡"]

EMOJI = ["😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "🇺", "❤️", "☺", "🧑🏿‍🚀", "1️⃣", "©️", "🫠", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "‍", "️", "🏿"]

MARKS = ["e\u0301", "a\u0323\u0302", "a\u0302\u0323", "q\u0307\u0323", "\u0301", "\u1100\u1161\u11a8",
         "\uac00\u11a8", "\u0344", "\u212b", "\u0958", "o\u031b\u0323", "Z\u0335\u0327\u0308" * 5,
         "\u0f71\u0f72", "\u0915\u093c", "\U0001d15e", "\ufb4f", "\ufdfa", "\u1e9b\u0323",
         "\U00011935\U00011930", "\u0061\u07fd\u0301", "s\u0323\u0307"]

CODE = ["def f(x):\n    return x**2\n", "for (int i = 0; i < n; ++i) {\n\t\ta[i] += b[i];\n\t}\n",
        "SELECT * FROM t WHERE a >= 1;--", "<div class=\"x\">&nbsp;</div>", "{\"key\": [1, 2, null]}",
        "https://example.org/a?b=c&d=%20#frag", "C:\\Users\\x\\n", "#!/bin/sh\nset -eu\n", "$$\\alpha_{i}^{2}$$",
        "x=>x??y?.z!==`${w}`", "/* ... */ // ---", "0b1010 | ~mask << 3", "\\u00e9\\n\\\\", "@@ -1,7 +1,7 @@"]

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_start|>user\n", "<|im_end", "|im_end|>",
           "<|im_start|", "<s>", "</s>", "<unk>", "<0x0A>", "<0xE5>", "<0xe5>", "[INST]", "[/INST]",
           "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<<SYS>>", "<|", "|>", "<repo_name>",
           "<jupyter_text>", "<|im_start|><|im_end|>", "<mask>", "<tab>", "▁", "Ġ", "▁▁the", "ĠĊ"]

BROKEN = [b"\x80", b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\xaf",
          b"\xf4\x90\x80\x80", b"\xe0\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xc3(", b"\xe2(\xa1",
          b"\xf0\x9f\x98\xf0\x9f\x98\x80", b"\xfe\xfe", b"\xe2\x82\xe2\x82\xac"]


def assigned():
    """Every code point that this Python or a newer Unicode knows, private use left to a few."""
    ranges = [(0, 0xD800), (0xE000, 0xE010), (0xF8F0, 0x1B300), (0x1BC00, 0x1BCB0), (0x1CC00, 0x1FC00),
              (0x1FFFE, 0x20010), (0x2A6D0, 0x2A710), (0x2B730, 0x2B830), (0x2CEA0, 0x2CEC0),
              (0x2EBE0, 0x2EE70), (0x2F800, 0x2FA20), (0x30000, 0x30010), (0x31340, 0x32400),
              (0xE0000, 0xE01F0), (0xF0000, 0xF0010), (0x10FFF0, 0x110000)]
    seen = set()
    for first, last in ranges:
        seen.update(range(first, last))
    for c in range(sys.maxunicode + 1):
        if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs"):
            seen.add(c)
    return sorted(seen)


def every_code_point(rng):
    """Strings that hold each code point in two surroundings."""
    points = assigned()
    for contexts in (["", " ", "a", "1", "\n"], ["", "é", "'", ".", "\u3000"]):
        for i in range(0, len(points), 12):
            parts = []
            for c in points[i:i + 12]:
                parts += [chr(c), rng.choice(contexts)]
            yield "".join(parts).encode()
        rng.shuffle(points)


def one_atom(rng, points):
    kind = rng.randrange(14)
    if kind <= 3:
        return rng.choice(WORDS).encode()
    if kind == 4:
        space = rng.choice([" ", rng.choice(WHITE_SPACE), rng.choice(WHITE_SPACE + NEARLY_SPACE)])
        return (space * rng.choice([1, 1, 2, 3, 5, 9])).encode()
    if kind == 5:
        return "".join(rng.choice(WHITE_SPACE) for _ in range(rng.randrange(1, 6))).encode()
    if kind == 6:
        return (rng.choice(WORDS) + rng.choice(CONTRACTIONS)).encode()
    if kind == 7:
        return rng.choice(DIGITS).encode()
    if kind == 8:
        return rng.choice(EMOJI).encode()
    if kind == 9:
        return rng.choice(MARKS).encode()
    if kind == 10:
        return rng.choice(CODE).encode()
    if kind == 11:
        return rng.choice(SPECIAL).encode()
    if kind == 12:
        return "".join(chr(rng.choice(points)) for _ in range(rng.randrange(1, 5))).encode()
    return rng.choice([rng.choice(BROKEN), rng.randbytes(rng.randrange(1, 6)),
                       bytes([rng.randrange(32)]), "\x7f\x80\x9f".encode()])


def random_strings(rng, count):
    points = assigned()
    for _ in range(count):
        glue = rng.choice([b"", b" ", b" ", b" ", b"\n"])
        parts = []
        for _ in range(rng.choice([1, 2, 3, 4, 6, 8, 12])):
            parts.append(one_atom(rng, points))
            if rng.random() < 0.7:
                parts.append(glue)
        yield b"".join(parts)


def long_strings(rng):
    """Long runs of one thing: where a wrong complexity or a wrong tie shows."""
    for atom in ["a", " ", "\n", "\t ", " \n", "ab", "the ", "0", "é", "日", "😀", "\u0301", "e\u0301",
                 "'s", "▁", "_", "\r\n", "\u0315\u0300", "<|im_end|>", "<", "\x00", "aA", "=", "가"]:
        for n in (2, 3, 17, 100, 1000, rng.randrange(1000, 5000)):
            yield (atom * n).encode()
            yield (atom * n).encode() + rng.choice([b"x", b" x", b"\n", b"\xff"])


def all_strings(seed, count):
    """At least `count` different strings: the fixed families, then random ones."""
    rng = random.Random(seed)
    seen = {b""}
    for family in (every_code_point(rng), long_strings(rng)):
        seen.update(family)
    least = max(count, len(seen) + count // 2)
    for text in random_strings(rng, 10 * count):
        if len(seen) >= least:
            break
        seen.add(text)
    return sorted(seen)
