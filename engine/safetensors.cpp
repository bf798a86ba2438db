#include "engine/safetensors.h"

#include <fcntl.h>
#include <sodium.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_join.h"
#include "engine/float16.h"
#include "engine/json_file.h"
#include "engine/text.h"

namespace infemeral {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr std::size_t kLengthBytes = 8;               // the header's length, before the header
constexpr std::size_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr std::size_t kMaxRank = 16;                  // far above any model's; bounds memory
constexpr std::size_t kAlignment = 64;                // of the data section that we write
constexpr std::size_t kWriteBufferBytes = 4 << 20;
constexpr std::size_t kMaxIndexBytes = 100'000'000;

std::string shape_text(std::span<const std::size_t> shape) {
  return cat("[", absl::StrJoin(shape, ", "), "]");
}

std::optional<Dtype> parse_dtype(std::string_view name) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16, Dtype::kI8}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  return std::nullopt;
}

// Bits of an element of any dtype of the format; 0 for a name that we have never heard of.
std::size_t dtype_bits(std::string_view name) {
  static constexpr std::pair<std::string_view, std::size_t> kBits[] = {
      {"F32", 32}, {"F16", 16}, {"BF16", 16},   {"I8", 8},      {"F64", 64},    {"I64", 64},
      {"U64", 64}, {"C64", 64}, {"I32", 32},    {"U32", 32},    {"I16", 16},    {"U16", 16},
      {"U8", 8},   {"BOOL", 8}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F4", 4},
  };
  for (const auto& [known, bits] : kBits) {
    if (name == known) return bits;
  }
  return 0;
}

struct Entry {
  std::string dtype;
  std::vector<std::size_t> shape;
  std::vector<std::uint64_t> offsets;  // begin and end in the data section
  bool has_dtype = false, has_shape = false, has_offsets = false;
};

// Takes the header as a stream of events and accepts the format's grammar and nothing else:
//   { "__metadata__": {string: string}, name: {"dtype": s, "shape": [n...], "data_offsets": [n,
//   n]}}
// So duplicate keys are seen, nesting ends at depth 3, and no tree of hostile size is built.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::map<std::string, Entry, std::less<>> entries;
  std::map<std::string, std::string, std::less<>> metadata;
  std::string fault;  // set when a call below returned false

  bool key(string_t& name) override {
    if (depth_ == 1) {
      is_metadata_ = name == "__metadata__";
      if (is_metadata_) {
        if (std::exchange(seen_metadata_, true)) return fail("__metadata__ appears twice");
      } else {
        if (name.empty()) return fail("a tensor has an empty name");
        const auto [it, is_new] = entries.try_emplace(name);
        if (!is_new) return fail(cat("tensor ", quote_name(name), " appears twice"));
        entry_ = &it->second;
      }
      name_ = name;
      return true;
    }
    if (is_metadata_) {
      if (metadata.contains(name)) return fail("a key of __metadata__ appears twice");
    } else {
      bool* seen = name == "dtype"          ? &entry_->has_dtype
                   : name == "shape"        ? &entry_->has_shape
                   : name == "data_offsets" ? &entry_->has_offsets
                                            : nullptr;
      if (seen == nullptr) return fail_field(cat("has the unknown field ", quote_name(name)));
      if (std::exchange(*seen, true)) return fail_field(cat("has two fields ", name));
    }
    field_ = name;
    return true;
  }
  bool start_object(std::size_t) override {
    if (depth_ >= 2 || in_array_) return fail_value("an object");
    ++depth_;
    return true;
  }
  bool end_object() override {
    --depth_;
    return true;
  }
  bool start_array(std::size_t) override {
    if (depth_ != 2 || is_metadata_ || in_array_ || field_ == "dtype") return fail_value("a list");
    in_array_ = true;
    return true;
  }
  bool end_array() override {
    in_array_ = false;
    return true;
  }
  bool number_unsigned(number_unsigned_t value) override {
    if (!in_array_) return fail_value("a number");
    const bool is_shape = field_ == "shape";
    const std::size_t count = is_shape ? entry_->shape.size() : entry_->offsets.size();
    if (count >= (is_shape ? kMaxRank : 2)) {
      return fail_field(cat("has more than ", count, " numbers in ", field_));
    }
    if (is_shape) {
      entry_->shape.push_back(value);
    } else {
      entry_->offsets.push_back(value);
    }
    return true;
  }
  bool string(string_t& value) override {
    if (depth_ == 2 && is_metadata_) {
      metadata.emplace(field_, value);
    } else if (depth_ == 2 && !in_array_ && field_ == "dtype") {
      entry_->dtype = value;
    } else {
      return fail_value("a string");
    }
    return true;
  }
  bool null() override { return fail_value("null"); }
  bool boolean(bool) override { return fail_value("a boolean"); }
  bool number_integer(number_integer_t) override { return fail_value("a negative number"); }
  bool number_float(number_float_t, const string_t&) override {
    return fail_value("a number that is not an integer of 64 bits");
  }
  bool binary(binary_t&) override { return fail_value("binary data"); }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    return fail(cat("the header is not valid JSON at its byte ", position));
  }

 private:
  bool fail(std::string text) {
    fault = std::move(text);
    return false;
  }
  bool fail_field(std::string_view text) {
    return fail(cat("tensor ", quote_name(name_), " ", text));
  }
  bool fail_value(std::string_view what) {
    if (depth_ == 0) return fail("the header is not a JSON object");
    if (depth_ == 1) return fail(cat("entry ", quote_name(name_), " is ", what));
    return fail(cat("field ", quote_name(field_), " of ", quote_name(name_), " holds ", what));
  }

  int depth_ = 0;
  bool in_array_ = false;
  bool is_metadata_ = false;
  bool seen_metadata_ = false;
  std::string name_, field_;
  Entry* entry_ = nullptr;
};

// Bytes of a tensor, or nothing when the product overflows or does not fill whole bytes.
std::optional<std::uint64_t> byte_size(std::span<const std::size_t> shape, std::size_t bits) {
  std::uint64_t elements = 1;
  for (const std::size_t n : shape) {
    if (__builtin_mul_overflow(elements, n, &elements)) return std::nullopt;
  }
  std::uint64_t total = 0;
  if (__builtin_mul_overflow(elements, bits, &total) || total % 8 != 0) return std::nullopt;
  return total / 8;
}

}  // namespace

std::size_t dtype_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return 4;
    case Dtype::kF16:
    case Dtype::kBF16:
      return 2;
    case Dtype::kI8:
      return 1;
  }
  return 0;
}

std::string_view dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return "F32";
    case Dtype::kF16:
      return "F16";
    case Dtype::kBF16:
      return "BF16";
    case Dtype::kI8:
      return "I8";
  }
  return "?";
}

std::size_t TensorView::elements() const {
  return data.size() / dtype_bytes(dtype);
}

float TensorView::at(std::size_t i) const {
  float value = 0;
  read(i, {&value, 1});
  return value;
}

void TensorView::read(std::size_t begin, std::span<float> out) const {
  const std::byte* source = data.data() + begin * dtype_bytes(dtype);
  const auto half = [source](std::size_t i) {
    std::uint16_t value;
    std::memcpy(&value, source + 2 * i, 2);
    return value;
  };
  switch (dtype) {
    case Dtype::kF32:
      if (!out.empty()) std::memcpy(out.data(), source, out.size_bytes());
      break;
    case Dtype::kF16:
      for (std::size_t i = 0; i < out.size(); ++i) out[i] = f16_to_f32(half(i));
      break;
    case Dtype::kBF16:
      for (std::size_t i = 0; i < out.size(); ++i) out[i] = bf16_to_f32(half(i));
      break;
    case Dtype::kI8:
      for (std::size_t i = 0; i < out.size(); ++i) {
        out[i] = static_cast<float>(std::to_integer<std::int8_t>(source[i]));
        if (!row_scales.empty()) out[i] *= row_scales[(begin + i) / shape[1]];
      }
      break;
  }
}

// Owns a read-only mapping of a whole file.
class Safetensors::Mapping {
 public:
  static absl::StatusOr<std::shared_ptr<const Mapping>> open(const std::filesystem::path& file) {
    const int fd = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno_status(errno, "cannot open", file);
    const absl::Cleanup close_file = [fd] { ::close(fd); };
    struct stat info = {};
    if (::fstat(fd, &info) != 0) return errno_status(errno, "cannot read", file);
    if (!S_ISREG(info.st_mode)) {
      return absl::InvalidArgumentError(cat(file.string(), " is not a regular file"));
    }
    const auto size = static_cast<std::size_t>(info.st_size);
    if (size == 0) return absl::DataLossError(cat(file.string(), ": the file is empty"));
    void* address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (address == MAP_FAILED) return errno_status(errno, "cannot map", file);
    return std::shared_ptr<const Mapping>(new Mapping(static_cast<std::byte*>(address), size));
  }
  ~Mapping() { ::munmap(address_, size_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::span<const std::byte> bytes() const { return {address_, size_}; }

  // True if the part is of this file. What the advice is for, and only that, is lost when the
  // system cannot take it.
  bool advise(std::span<const std::byte> part, int advice) const {
    if (part.data() < address_ || part.data() >= address_ + size_) return false;
    const auto offset = static_cast<std::size_t>(part.data() - address_);
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const std::size_t begin = offset / page * page;
    ::madvise(address_ + begin, offset + part.size() - begin, advice);
    return true;
  }

 private:
  Mapping(std::byte* address, std::size_t size) : address_(address), size_(size) {}
  std::byte* address_;
  std::size_t size_;
};

absl::Status Safetensors::add_file(const std::filesystem::path& file) {
  auto mapping = Mapping::open(file);
  if (!mapping.ok()) return mapping.status();
  mappings_.push_back(*mapping);
  return add_image((*mapping)->bytes(), file.string());
}

absl::Status Safetensors::add_image(std::span<const std::byte> image, std::string_view name) {
  const auto damaged = [name](const auto&... text) {
    return absl::DataLossError(cat(name, ": ", text...));
  };
  if (image.size() < kLengthBytes) {
    return damaged("the file has ", image.size(), " bytes, too few for a safetensors file");
  }
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, image.data(), kLengthBytes);
  if (header_bytes > kMaxHeaderBytes) {
    return damaged("the header claims ", header_bytes, " bytes, above the limit of ",
                   kMaxHeaderBytes);
  }
  if (header_bytes > image.size() - kLengthBytes) {
    return damaged("the header claims ", header_bytes, " bytes, but only ",
                   image.size() - kLengthBytes, " follow; the file is cut short");
  }
  const std::string_view header(reinterpret_cast<const char*>(image.data()) + kLengthBytes,
                                header_bytes);
  if (!header.starts_with('{')) return damaged("the header is not a JSON object");
  const std::span<const std::byte> data = image.subspan(kLengthBytes + header_bytes);

  HeaderReader reader;
  try {
    if (!nlohmann::json::sax_parse(header, &reader)) return damaged(reader.fault);
  } catch (const std::exception& e) {
    return damaged("the header cannot be read: ", e.what());
  }

  struct Range {
    std::uint64_t begin, end;
    const std::string* name;
  };
  std::vector<Range> ranges;
  ranges.reserve(reader.entries.size());
  for (const auto& [tensor, entry] : reader.entries) {
    if (!entry.has_dtype || !entry.has_shape || entry.offsets.size() != 2) {
      return damaged("tensor ", quote_name(tensor), " lacks dtype, shape or two data_offsets");
    }
    const std::uint64_t begin = entry.offsets[0], end = entry.offsets[1];
    if (begin > end || end > data.size()) {
      return damaged("tensor ", quote_name(tensor), " claims bytes ", begin, " to ", end, " of ",
                     data.size());
    }
    const std::size_t bits = dtype_bits(entry.dtype);
    if (bits != 0) {
      const std::optional<std::uint64_t> expected = byte_size(entry.shape, bits);
      if (expected != end - begin) {
        return damaged("tensor ", quote_name(tensor), " of dtype ", entry.dtype, " and shape ",
                       shape_text(entry.shape), " does not fit its ", end - begin, " bytes");
      }
    }
    ranges.push_back({begin, end, &tensor});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  std::uint64_t covered = 0;
  for (const Range& range : ranges) {
    if (range.begin != covered) {
      return damaged(range.begin < covered ? "two tensors overlap" : "there is a hole",
                     " before tensor ", quote_name(*range.name));
    }
    covered = range.end;
  }
  if (covered != data.size()) {
    return damaged(data.size() - covered, " bytes at the end belong to no tensor");
  }

  for (auto& [tensor, entry] : reader.entries) {
    if (tensors_.contains(tensor) || unread_.contains(tensor)) {
      return damaged("tensor ", quote_name(tensor), " is in an earlier shard too");
    }
    const std::optional<Dtype> dtype = parse_dtype(entry.dtype);
    if (!dtype) {
      unread_.emplace(tensor, entry.dtype);
      continue;
    }
    const std::span<const std::byte> bytes =
        data.subspan(entry.offsets[0], entry.offsets[1] - entry.offsets[0]);
    if (reinterpret_cast<std::uintptr_t>(bytes.data()) % dtype_bytes(*dtype) != 0) {
      return damaged("tensor ", quote_name(tensor), " of dtype ", entry.dtype,
                     " starts at an odd address; save the file again with a current writer");
    }
    tensors_.emplace(tensor, TensorView{*dtype, std::move(entry.shape), bytes});
  }
  metadata_.merge(reader.metadata);
  return absl::OkStatus();
}

absl::StatusOr<Safetensors> Safetensors::open(const std::filesystem::path& file) {
  Safetensors result;
  if (absl::Status status = result.add_file(file); !status.ok()) return status;
  return result;
}

absl::StatusOr<Safetensors> Safetensors::parse(std::span<const std::byte> image,
                                               std::string_view name) {
  Safetensors result;
  if (absl::Status status = result.add_image(image, name); !status.ok()) return status;
  return result;
}

absl::StatusOr<Safetensors> Safetensors::open_folder(const std::filesystem::path& folder) {
  std::error_code ignored;
  const std::filesystem::path single = folder / "model.safetensors";
  if (std::filesystem::exists(single, ignored)) return open(single);

  const std::filesystem::path index_file = folder / "model.safetensors.index.json";
  if (!std::filesystem::exists(index_file, ignored)) {
    return absl::NotFoundError(
        cat(folder.string(), " holds neither model.safetensors nor model.safetensors.index.json"));
  }
  const auto text = read_text_file(index_file, kMaxIndexBytes);
  if (!text.ok()) return text.status();
  const auto index = parse_json(*text, index_file.string());
  if (!index.ok()) return index.status();
  const auto damaged = [&index_file](const auto&... message) {
    return absl::DataLossError(cat(index_file.string(), ": ", message...));
  };
  if (!index->is_object() || !index->contains("weight_map") ||
      !index->at("weight_map").is_object()) {
    return damaged("there is no object weight_map");
  }
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : index->at("weight_map").items()) {
    if (!shard.is_string()) return damaged("the shard of ", quote_name(tensor), " is not a name");
    const auto& name = shard.get_ref<const std::string&>();
    // Only a plain name: the index must not make us read outside its folder.
    if (!name.ends_with(".safetensors") || name.starts_with('.') ||
        name.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos) {
      return damaged("the shard name ", quote_name(name), " is not a plain .safetensors file name");
    }
    shards.insert(name);
  }
  if (shards.empty()) return damaged("weight_map names no tensor");

  Safetensors result;
  for (const std::string& shard : shards) {
    if (absl::Status status = result.add_file(folder / shard); !status.ok()) return status;
  }
  for (const auto& [tensor, shard] : index->at("weight_map").items()) {
    if (!result.tensors_.contains(tensor) && !result.unread_.contains(tensor)) {
      return damaged("tensor ", quote_name(tensor), " is in none of the shards");
    }
  }
  return result;
}

const TensorView* Safetensors::find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

absl::StatusOr<TensorView> Safetensors::get(std::string_view name,
                                            std::span<const std::size_t> shape) const {
  if (const auto it = unread_.find(name); it != unread_.end()) {
    return absl::UnimplementedError(cat("tensor ", quote_name(name), " has the dtype ",
                                        quote_name(it->second),
                                        "; F32, F16, BF16 and I8 can be read"));
  }
  const TensorView* view = find(name);
  if (view == nullptr) {
    return absl::InvalidArgumentError(cat("there is no tensor ", quote_name(name),
                                          "; one of shape ", shape_text(shape), " is needed"));
  }
  if (!std::equal(shape.begin(), shape.end(), view->shape.begin(), view->shape.end())) {
    return absl::InvalidArgumentError(cat("tensor ", quote_name(name), " has the shape ",
                                          shape_text(view->shape), "; ", shape_text(shape),
                                          " is needed"));
  }
  return *view;
}

void Safetensors::advise(const TensorView& tensor, int advice) const {
  for (const auto& mapping : mappings_) {
    if (mapping->advise(tensor.data, advice)) return;
  }
}

void Safetensors::release_pages(const TensorView& tensor) const {
  // A read-only mapping of a file: whatever is dropped comes back when it is touched.
  advise(tensor, MADV_DONTNEED);
}

void Safetensors::prefetch(const TensorView& tensor) const {
  advise(tensor, MADV_WILLNEED);
}

void Safetensors::expect_streaming(const TensorView& tensor) const {
  advise(tensor, MADV_HUGEPAGE);
}

absl::StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::create(
    const std::filesystem::path& file, std::vector<Declaration> tensors,
    const std::map<std::string, std::string, std::less<>>& metadata, unsigned mode) {
  std::string header;
  std::uint64_t offset = 0;
  try {
    nlohmann::ordered_json json = nlohmann::ordered_json::object();
    if (!metadata.empty()) json["__metadata__"] = metadata;
    for (const Declaration& tensor : tensors) {
      const auto bytes = byte_size(tensor.shape, 8 * dtype_bytes(tensor.dtype));
      std::uint64_t end = 0;
      if (!bytes || __builtin_add_overflow(offset, *bytes, &end)) {
        return absl::InvalidArgumentError(
            cat("tensor ", quote_name(tensor.name), " is too large to be written"));
      }
      if (offset % dtype_bytes(tensor.dtype) != 0) {
        return absl::InvalidArgumentError(cat("tensor ", quote_name(tensor.name),
                                              " would not be aligned; declare wider dtypes first"));
      }
      if (tensor.name == "__metadata__" || json.contains(tensor.name)) {
        return absl::InvalidArgumentError(
            cat("tensor ", quote_name(tensor.name), " is declared twice or has no free name"));
      }
      json[tensor.name] = {{"dtype", dtype_name(tensor.dtype)},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, end}}};
      offset = end;
    }
    header = json.dump();
  } catch (const std::exception& e) {
    return absl::InvalidArgumentError(
        cat("cannot describe the tensors of ", file.string(), ": ", e.what()));
  }
  const std::size_t used = (kLengthBytes + header.size()) % kAlignment;
  if (used != 0) header.append(kAlignment - used, ' ');

  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter);
  writer->fd_ = ::open(file.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
  if (writer->fd_ < 0) return errno_status(errno, "cannot create", file);
  writer->file_ = file;
  writer->buffer_.reserve(kWriteBufferBytes);
  const std::uint64_t header_bytes = header.size();
  writer->remaining_ = kLengthBytes + header_bytes + offset;
  for (const auto part :
       {std::as_bytes(std::span(&header_bytes, 1)), std::as_bytes(std::span(header))}) {
    if (absl::Status status = writer->write(part); !status.ok()) return status;
  }
  return writer;
}

SafetensorsWriter::~SafetensorsWriter() {
  sodium_memzero(buffer_.data(), buffer_.size());  // the cloak's matrix goes through here too
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(file_.c_str());
}

absl::Status SafetensorsWriter::write(std::span<const std::byte> bytes) {
  if (fd_ < 0 || bytes.size() > remaining_) {
    return absl::InternalError(
        cat("more bytes for ", file_.string(), " than its tensors were declared with"));
  }
  remaining_ -= bytes.size();
  while (!bytes.empty()) {
    if (buffer_.empty() && bytes.size() >= kWriteBufferBytes) return write_through(bytes);
    const std::size_t n = std::min(bytes.size(), kWriteBufferBytes - buffer_.size());
    buffer_.insert(buffer_.end(), bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n));
    bytes = bytes.subspan(n);
    if (buffer_.size() == kWriteBufferBytes) {
      if (absl::Status status = flush(); !status.ok()) return status;
    }
  }
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::write_through(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno_status(errno, "cannot write", file_);
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::flush() {
  if (absl::Status status = write_through(buffer_); !status.ok()) return status;
  sodium_memzero(buffer_.data(), buffer_.size());
  buffer_.clear();
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::finish() {
  if (fd_ < 0 || remaining_ != 0) {
    return absl::InternalError(
        cat(remaining_, " declared bytes of ", file_.string(), " were not written"));
  }
  if (absl::Status status = flush(); !status.ok()) return status;
  if (::fsync(fd_) != 0) return errno_status(errno, "cannot write", file_);
  if (::close(std::exchange(fd_, -1)) != 0) {
    const absl::Status status = errno_status(errno, "cannot write", file_);
    ::unlink(file_.c_str());
    return status;
  }
  return absl::OkStatus();
}

}  // namespace infemeral
