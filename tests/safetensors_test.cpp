#include "engine/safetensors.h"

#include <sys/resource.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <csignal>
#include <cstring>
#include <fstream>
#include <limits>

#include "engine/float16.h"
#include "engine/json_file.h"
#include "engine/text.h"
#include "tests/page_advice.h"
#include "tests/test_random.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

using Shape = std::vector<std::size_t>;

// A file image with this header text and data size: exact size on the heap, so that the sanitizer
// sees an over-read.
std::vector<std::byte> image(std::string header, std::size_t data_bytes, bool pad = true) {
  if (pad) header.append((8 - header.size() % 8) % 8, ' ');
  std::vector<std::byte> bytes(8 + header.size() + data_bytes);
  const std::uint64_t length = header.size();
  std::memcpy(bytes.data(), &length, 8);
  std::memcpy(bytes.data() + 8, header.data(), header.size());
  for (std::size_t i = 8 + header.size(); i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::byte>(rng()());
  }
  return bytes;
}

std::string entry(std::string name, std::string dtype, std::string shape, std::string offsets) {
  return cat("\"", name, "\":{\"dtype\":\"", dtype, "\",\"shape\":", shape,
             ",\"data_offsets\":", offsets, "}");
}

void write_file(const std::filesystem::path& file, std::span<const std::byte> bytes) {
  std::ofstream(file, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
}

}  // namespace

TEST_CASE("what the writer wrote, the reader reads, in every dtype and piece size") {
  const TempFolder folder;
  const auto file = folder.path() / "t.safetensors";
  const std::vector<SafetensorsWriter::Declaration> tensors = {
      {"a.f32", Dtype::kF32, {3, 5}},      {"scalar", Dtype::kF32, {}},
      {"empty", Dtype::kF32, {0, 7}},      {"b.f16", Dtype::kF16, {70001}},
      {"c.bf16", Dtype::kBF16, {2, 2, 2}}, {"d.i8", Dtype::kI8, {9}}};
  std::vector<std::byte> data(15 * 4 + 4 + 70001 * 2 + 8 * 2 + 9);
  for (std::byte& b : data) b = static_cast<std::byte>(rng()());

  auto writer = SafetensorsWriter::create(file, tensors, {{"note", "a \"quoted\" value"}});
  REQUIRE(writer.ok());
  for (std::size_t at = 0; at < data.size();) {
    const std::size_t n = std::min<std::size_t>(data.size() - at, rng()() % 50000);
    REQUIRE((*writer)->write(std::span(data).subspan(at, n)).ok());
    at += n;
  }
  REQUIRE((*writer)->finish().ok());

  auto opened = Safetensors::open(file);
  REQUIRE(opened.ok());
  const Safetensors moved = *std::move(opened);
  CHECK(moved.metadata().at("note") == "a \"quoted\" value");
  REQUIRE(moved.tensors().size() == tensors.size());
  const std::byte* expected = data.data();
  for (const auto& declared : tensors) {
    const auto view = moved.get(declared.name, declared.shape);
    REQUIRE(view.ok());
    CHECK(view->dtype == declared.dtype);
    CHECK(std::memcmp(view->data.data(), expected, view->data.size()) == 0);
    expected += view->data.size();
  }
  CHECK(expected == data.data() + data.size());
  CHECK(reinterpret_cast<std::uintptr_t>(moved.find("a.f32")->data.data()) % 64 == 0);
  CHECK(moved.find("empty")->elements() == 0);
  CHECK(moved.find("scalar")->elements() == 1);

  // Dropped pages come back.
  const std::vector<std::byte> before(moved.find("b.f16")->data.begin(),
                                      moved.find("b.f16")->data.end());
  moved.release_pages(*moved.find("b.f16"));
  CHECK(std::equal(before.begin(), before.end(), moved.find("b.f16")->data.begin()));

  if (has_huge_pages()) {
    const TensorView& streamed = *moved.find("b.f16");
    CHECK_FALSE(asked_for_huge_pages(streamed.data.data()));
    moved.expect_streaming(streamed);
    CHECK(asked_for_huge_pages(streamed.data.data()));
    CHECK(asked_for_huge_pages(streamed.data.data() + streamed.data.size() - 1));
    CHECK(std::equal(before.begin(), before.end(), streamed.data.begin()));
  }
}

TEST_CASE("elements are converted as their formats say") {
  const std::string header =
      cat("{", entry("f", "F32", "[2]", "[0,8]"), ",", entry("h", "F16", "[2]", "[8,12]"), ",",
          entry("b", "BF16", "[2]", "[12,16]"), ",", entry("i", "I8", "[3]", "[16,19]"), "}");
  std::vector<std::byte> bytes = image(header, 19);
  std::byte* data = bytes.data() + bytes.size() - 19;
  const float f[] = {1.5f, -3e38f};
  const std::uint16_t h[] = {0x3c01, 0xfbff}, b[] = {0x3f81, 0xff7f};
  const std::int8_t i[] = {-128, 0, 127};
  std::memcpy(data, f, 8);
  std::memcpy(data + 8, h, 4);
  std::memcpy(data + 12, b, 4);
  std::memcpy(data + 16, i, 3);
  const auto file = Safetensors::parse(bytes, "test");
  REQUIRE(file.ok());
  CHECK(file->find("f")->at(1) == -3e38f);
  CHECK(file->find("h")->at(0) == 1.0f + 0x1p-10f);
  CHECK(file->find("h")->at(1) == -65504.0f);
  CHECK(file->find("b")->at(0) == 1.0f + 0x1p-7f);
  CHECK(file->find("i")->at(0) == -128.0f);
  std::vector<float> middle(2, std::numeric_limits<float>::quiet_NaN());
  file->find("i")->read(1, middle);
  CHECK(middle == std::vector<float>{0, 127});
}

TEST_CASE("every kind of damage is refused with its own sentence") {
  struct Case {
    const char* what;
    std::string header;
    std::size_t data_bytes;
    const char* message;  // part of the error
  };
  const std::string deep = cat("{\"a\":", std::string(200000, '['), std::string(200000, ']'), "}");
  const std::string rank = cat("[", std::string(40000, '1'), "]");
  std::string many = "[1";
  for (int i = 0; i < 20; ++i) many += ",1";
  many += "]";
  const std::vector<Case> cases = {
      {"not an object", "[1]", 0, "not a JSON object"},
      {"empty header", "", 0, "not a JSON object"},
      {"broken JSON", "{\"a\":", 0, "not valid JSON"},
      {"bad UTF-8", "{\"\xff\":1}", 0, "not valid JSON"},
      {"two values", "{}{}", 0, "not valid JSON"},
      {"entry is a number", "{\"a\":3}", 0, "is a number"},
      {"entry is null", "{\"a\":null}", 0, "is null"},
      {"deep nesting", deep, 0, "a list"},
      {"deep objects", "{\"a\":{\"dtype\":{\"b\":1}}}", 0, "an object"},
      {"huge shape number", cat("{", entry("a", "F32", rank, "[0,4]"), "}"), 4, "not valid JSON"},
      {"duplicate tensor",
       cat("{", entry("a", "I8", "[1]", "[0,1]"), ",", entry("a", "I8", "[1]", "[1,2]"), "}"), 2,
       "appears twice"},
      {"duplicate field", "{\"a\":{\"dtype\":\"I8\",\"dtype\":\"I8\"}}", 0, "two fields"},
      {"unknown field", "{\"a\":{\"dtype\":\"I8\",\"sparse\":\"x\"}}", 0, "unknown field"},
      {"missing field", "{\"a\":{\"dtype\":\"I8\",\"shape\":[1]}}", 1, "lacks"},
      {"one offset", cat("{", entry("a", "I8", "[1]", "[0]"), "}"), 1, "lacks"},
      {"three offsets", cat("{", entry("a", "I8", "[1]", "[0,1,1]"), "}"), 1, "more than 2"},
      {"rank", cat("{", entry("a", "I8", many, "[0,1]"), "}"), 1, "more than 16"},
      {"empty name", cat("{", entry("", "I8", "[1]", "[0,1]"), "}"), 1, "empty name"},
      {"negative shape", cat("{", entry("a", "I8", "[-1]", "[0,1]"), "}"), 1, "negative"},
      {"float shape", cat("{", entry("a", "I8", "[1.0]", "[0,1]"), "}"), 1, "not an integer"},
      {"nested shape", cat("{", entry("a", "I8", "[[1]]", "[0,1]"), "}"), 1, "a list"},
      {"shape is a string", cat("{", entry("a", "I8", "\"1\"", "[0,1]"), "}"), 1, "a string"},
      {"boolean shape", cat("{", entry("a", "I8", "[true]", "[0,1]"), "}"), 1, "a boolean"},
      {"2^64", cat("{", entry("a", "I8", "[18446744073709551616]", "[0,1]"), "}"), 1, "64 bits"},
      {"overflowing product", cat("{", entry("a", "F32", "[4294967296,4294967296]", "[0,0]"), "}"),
       0, "does not fit"},
      {"overflowing bytes", cat("{", entry("a", "F32", "[4611686018427387904]", "[0,0]"), "}"), 0,
       "does not fit"},
      {"too few bytes", cat("{", entry("a", "F32", "[2]", "[0,4]"), "}"), 4, "does not fit"},
      {"too many bytes", cat("{", entry("a", "F16", "[2]", "[0,8]"), "}"), 8, "does not fit"},
      {"foreign dtype, wrong size", cat("{", entry("a", "I64", "[2]", "[0,8]"), "}"), 8,
       "does not fit"},
      {"half a byte", cat("{", entry("a", "F4", "[3]", "[0,1]"), "}"), 1, "does not fit"},
      {"offsets backwards", cat("{", entry("a", "I8", "[0]", "[1,0]"), "}"), 1, "claims bytes"},
      {"offsets outside", cat("{", entry("a", "I8", "[5]", "[0,5]"), "}"), 4, "claims bytes"},
      {"huge offsets",
       cat("{", entry("a", "I8", "[1]", "[18446744073709551614,18446744073709551615]"), "}"), 1,
       "claims bytes"},
      {"hole",
       cat("{", entry("a", "I8", "[1]", "[0,1]"), ",", entry("b", "I8", "[1]", "[2,3]"), "}"), 3,
       "hole"},
      {"hole at the start", cat("{", entry("a", "I8", "[1]", "[1,2]"), "}"), 2, "hole"},
      {"overlap",
       cat("{", entry("a", "I8", "[2]", "[0,2]"), ",", entry("b", "I8", "[2]", "[1,3]"), "}"), 3,
       "overlap"},
      {"trailing bytes", cat("{", entry("a", "I8", "[1]", "[0,1]"), "}"), 4, "no tensor"},
      {"metadata is a list", "{\"__metadata__\":[]}", 0, "a list"},
      {"metadata holds a number", "{\"__metadata__\":{\"a\":1}}", 0, "a number"},
      {"metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "twice"},
      {"metadata key twice", "{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0, "twice"},
  };
  for (const Case& c : cases) {
    INFO(c.what);
    const auto result = Safetensors::parse(image(c.header, c.data_bytes), "the file");
    REQUIRE_FALSE(result.ok());
    INFO(result.status().ToString());
    CHECK(absl::IsDataLoss(result.status()));
    CHECK(std::string(result.status().message()).find(c.message) != std::string::npos);
    CHECK(std::string(result.status().message()).starts_with("the file: "));
    CHECK(result.status().message().size() < 600);
  }
}

TEST_CASE("lengths that lie are refused, and so is a file cut at any byte") {
  const std::string header =
      cat("{", entry("a", "F32", "[4]", "[0,16]"), ",", entry("b", "F16", "[3]", "[16,22]"), "}");
  const std::vector<std::byte> whole = image(header, 22);
  REQUIRE(Safetensors::parse(whole, "whole").ok());
  for (std::size_t size = 0; size < whole.size(); ++size) {
    const std::vector<std::byte> cut(whole.begin(),
                                     whole.begin() + static_cast<std::ptrdiff_t>(size));
    CHECK(absl::IsDataLoss(Safetensors::parse(cut, "cut").status()));
  }
  for (const std::uint64_t length : {std::uint64_t{100'000'001}, std::uint64_t{1} << 63,
                                     ~std::uint64_t{0}, std::uint64_t{whole.size() - 7}}) {
    std::vector<std::byte> bytes = whole;
    std::memcpy(bytes.data(), &length, 8);
    CHECK(absl::IsDataLoss(Safetensors::parse(bytes, "long").status()));
  }
}

TEST_CASE("a dtype that nobody reads does not spoil the file; a tensor that is asked for does") {
  const std::string header =
      cat("{", entry("ids", "I64", "[1]", "[0,8]"), ",", entry("new", "F3_E1M1", "[9]", "[8,12]"),
          ",", entry("a", "F32", "[1]", "[12,16]"), "}");
  const auto bytes = image(header, 16);
  const auto file = Safetensors::parse(bytes, "mixed");
  REQUIRE(file.ok());
  CHECK(file->tensors().size() == 1);
  CHECK(file->find("ids") == nullptr);
  CHECK(file->unread().at("new") == "F3_E1M1");
  CHECK(absl::IsUnimplemented(file->get("ids", Shape{1}).status()));
  const auto wrong_shape = file->get("a", Shape{2, 3});
  CHECK(absl::IsInvalidArgument(wrong_shape.status()));
  CHECK(std::string(wrong_shape.status().message()).find("[1]") != std::string::npos);
  CHECK(std::string(wrong_shape.status().message()).find("[2, 3]") != std::string::npos);
  CHECK(absl::IsInvalidArgument(file->get("b", Shape{1}).status()));
}

TEST_CASE("tensors that are not aligned to their elements are refused") {
  const std::string header =
      cat("{", entry("a", "I8", "[1]", "[0,1]"), ",", entry("b", "F32", "[1]", "[1,5]"), "}");
  const auto result = Safetensors::parse(image(header, 5), "odd");
  CHECK(absl::IsDataLoss(result.status()));
  CHECK(std::string(result.status().message()).find("odd address") != std::string::npos);
}

TEST_CASE("shards: the index is checked against the files, and cannot point outside") {
  const TempFolder folder;
  const auto model = folder.path() / "model";
  make_tiny_model(model, {.sharded = true});
  make_tiny_model(folder.path() / "single", {});
  const auto sharded = Safetensors::open_folder(model);
  const auto single = Safetensors::open_folder(folder.path() / "single");
  REQUIRE(sharded.ok());
  REQUIRE(single.ok());
  REQUIRE(sharded->tensors().size() == single->tensors().size());
  for (const auto& [name, view] : single->tensors()) {
    const auto other = sharded->get(name, view.shape);
    REQUIRE(other.ok());
    CHECK(std::equal(view.data.begin(), view.data.end(), other->data.begin(), other->data.end()));
  }

  const auto index = model / "model.safetensors.index.json";
  const auto with_index = [&](std::string text) {
    std::ofstream(index) << text;
    return Safetensors::open_folder(model).status();
  };
  std::filesystem::copy_file(folder.path() / "single" / "model.safetensors",
                             folder.path() / "outside.safetensors");
  for (const char* name :
       {"../outside.safetensors", "/etc/passwd", "/x.safetensors", "..", "", "a/b.safetensors",
        ".safetensors", "a\\\\b.safetensors", "a\\u0000.safetensors", "config.json"}) {
    INFO(name);
    const absl::Status status = with_index(cat("{\"weight_map\":{\"a\":\"", name, "\"}}"));
    CHECK(absl::IsDataLoss(status));
    CHECK(std::string(status.message()).find("plain") != std::string::npos);
  }
  CHECK(absl::IsDataLoss(with_index("{\"weight_map\":{\"a\":3}}")));
  CHECK(absl::IsDataLoss(with_index("{\"weight_map\":{}}")));
  CHECK(absl::IsDataLoss(with_index("[]")));
  CHECK(absl::IsInvalidArgument(with_index("{\"weight_map\"")));
  CHECK(absl::IsInvalidArgument(with_index(std::string(1000000, '['))));
  CHECK(absl::IsNotFound(with_index("{\"weight_map\":{\"a\":\"gone.safetensors\"}}")));
  CHECK(absl::IsDataLoss(
      with_index("{\"weight_map\":{\"a\":\"model-00001-of-00002.safetensors\"}}")));
  std::filesystem::copy_file(model / "model-00001-of-00002.safetensors",
                             model / "copy.safetensors");
  const absl::Status twice = with_index(
      "{\"weight_map\":{\"model.embed_tokens.weight\":\"copy.safetensors\","
      "\"b\":\"model-00001-of-00002.safetensors\"}}");
  CHECK(absl::IsDataLoss(twice));
  CHECK(std::string(twice.message()).find("earlier shard") != std::string::npos);
  CHECK(absl::IsNotFound(Safetensors::open_folder(folder.path()).status()));
}

TEST_CASE("files that are no files") {
  const TempFolder folder;
  CHECK(absl::IsNotFound(Safetensors::open(folder.path() / "none").status()));
  CHECK(absl::IsInvalidArgument(Safetensors::open(folder.path()).status()));
  write_file(folder.path() / "empty", {});
  CHECK(absl::IsDataLoss(Safetensors::open(folder.path() / "empty").status()));
  CHECK_FALSE(Safetensors::open("/dev/zero").ok());
}

TEST_CASE("the writer leaves nothing unfinished behind and refuses what it cannot do") {
  const TempFolder folder;
  const auto file = folder.path() / "t.safetensors";
  const std::vector<SafetensorsWriter::Declaration> tensors = {{"a", Dtype::kF32, {4}}};
  const std::vector<std::byte> bytes(17);
  {
    auto writer = SafetensorsWriter::create(file, tensors, {});
    REQUIRE(writer.ok());
    CHECK(absl::IsAlreadyExists(SafetensorsWriter::create(file, tensors, {}).status()));
    CHECK(absl::IsInternal((*writer)->write(bytes)));
    CHECK((*writer)->write(std::span(bytes).first(15)).ok());
    CHECK(absl::IsInternal((*writer)->finish()));
    CHECK(std::filesystem::exists(file));
  }
  CHECK_FALSE(std::filesystem::exists(file));
  CHECK(absl::IsNotFound(
      SafetensorsWriter::create(folder.path() / "no" / "t", tensors, {}).status()));
  CHECK(absl::IsInvalidArgument(
      SafetensorsWriter::create(file, {{"a", Dtype::kF32, {1}}, {"a", Dtype::kF32, {1}}}, {})
          .status()));
  CHECK(absl::IsInvalidArgument(
      SafetensorsWriter::create(file, {{"a", Dtype::kI8, {1}}, {"b", Dtype::kF32, {1}}}, {})
          .status()));
  CHECK(absl::IsInvalidArgument(
      SafetensorsWriter::create(file, {{"a", Dtype::kF32, {~std::size_t{0}, 4}}}, {}).status()));
  CHECK(absl::IsInvalidArgument(
      SafetensorsWriter::create(file, {{"\xff", Dtype::kF32, {1}}}, {}).status()));
  CHECK_FALSE(std::filesystem::exists(file));
}

TEST_CASE("a full disk is an error that names the file") {
  // A limit on the size of files stands in for the disk: the write fails at the same place.
  const TempFolder folder;
  const auto file = folder.path() / "t.safetensors";
  struct rlimit old = {};
  getrlimit(RLIMIT_FSIZE, &old);
  const struct rlimit small = {1 << 20, old.rlim_max};
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  setrlimit(RLIMIT_FSIZE, &small);
  absl::Status status;
  {
    auto writer = SafetensorsWriter::create(file, {{"a", Dtype::kI8, {16 << 20}}}, {});
    REQUIRE(writer.ok());
    const std::vector<std::byte> bytes(16 << 20);
    status = (*writer)->write(bytes);
    if (status.ok()) status = (*writer)->finish();
  }
  setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, old_handler);
  CHECK_FALSE(status.ok());
  CHECK(std::string(status.message()).find(file.string()) != std::string::npos);
  CHECK_FALSE(std::filesystem::exists(file));
}

}  // namespace infemeral
