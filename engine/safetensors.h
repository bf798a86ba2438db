// Reads and writes safetensors files (github.com/huggingface/safetensors): an 8-byte little-endian
// header length, a JSON header, then the tensors' bytes. Files are memory-mapped: a tensor is a
// view into the mapping and costs nothing until it is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace infemeral {

enum class Dtype : std::uint8_t { kF32, kF16, kBF16, kI8 };

std::size_t dtype_bytes(Dtype dtype);
std::string_view dtype_name(Dtype dtype);  // as in the file format: "F32", "F16", "BF16", "I8"

// A view of a tensor, row-major; valid as long as the SafetensorsFile (or set) it came from. The
// data starts at a multiple of its element size.
struct TensorView {
  Dtype dtype = Dtype::kF32;
  std::vector<std::size_t> shape;
  std::span<const std::byte> data;

  std::size_t elements() const;
  // Element i as float32 (i8: the plain integer).
  float at(std::size_t i) const;
  // Elements [begin, begin + out.size()) converted to float32; the range must be inside.
  void read(std::size_t begin, std::span<float> out) const;
};

// The tensors of one or several files under their names. Immutable; readable from any thread.
// Movable; views stay valid when it is moved.
class Safetensors {
 public:
  // One file. DataLoss (naming the file and the fault) for anything that is not a well-formed
  // safetensors file: header length, JSON, dtype and shape against byte range, holes, overlaps,
  // ranges outside the file. Unimplemented for a dtype that we do not read.
  static absl::StatusOr<Safetensors> open(const std::filesystem::path& file);

  // A Hugging Face folder: model.safetensors, or the shards that model.safetensors.index.json names
  // (only plain file names inside the folder). NotFound when there is neither.
  static absl::StatusOr<Safetensors> open_folder(const std::filesystem::path& folder);

  // Parses a file image that the caller keeps alive: for tests and fuzzing.
  static absl::StatusOr<Safetensors> parse(std::span<const std::byte> image, std::string_view name);

  // In the order of their names.
  const std::map<std::string, TensorView, std::less<>>& tensors() const { return tensors_; }
  const TensorView* find(std::string_view name) const;  // null when absent
  // The tensor of that name and shape, or an error that shows both sides: InvalidArgument.
  absl::StatusOr<TensorView> get(std::string_view name, std::span<const std::size_t> shape) const;
  const std::map<std::string, std::string, std::less<>>& metadata() const { return metadata_; }

 private:
  class Mapping;
  absl::Status add(std::shared_ptr<const Mapping> mapping, std::span<const std::byte> image,
                   std::string_view name);

  std::vector<std::shared_ptr<const Mapping>> mappings_;
  std::map<std::string, TensorView, std::less<>> tensors_;
  std::map<std::string, std::string, std::less<>> metadata_;
};

// Writes a safetensors file tensor by tensor: all names, dtypes and shapes first, then their bytes
// in the order in which they were declared, in pieces of any size. The file is complete after
// finish(); without it, it is removed. Data is aligned to 64 bytes.
class SafetensorsWriter {
 public:
  struct Declaration {
    std::string name;
    Dtype dtype;
    std::vector<std::size_t> shape;
  };
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> create(
      const std::filesystem::path& file, std::vector<Declaration> tensors,
      const std::map<std::string, std::string, std::less<>>& metadata);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // The next bytes of the data section.
  absl::Status write(std::span<const std::byte> bytes);
  // Flushes and closes. Internal when fewer bytes were written than were declared.
  absl::Status finish();

 private:
  SafetensorsWriter() = default;

  std::filesystem::path file_;
  int fd_ = -1;
  std::size_t remaining_ = 0;
  std::vector<std::byte> buffer_;
};

}  // namespace infemeral
