// Reads and writes safetensors files (github.com/huggingface/safetensors): an 8-byte little-endian
// header length, a JSON header, then the tensors' bytes. Files are memory-mapped: a tensor is a
// view into the mapping and costs nothing until it is read. As with every mapped file, a file that
// somebody shortens while it is open ends the process when a lost page is read.
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
  std::vector<float>
      row_scales;  // kI8 of two dimensions: what read() multiplies a row with, or empty

  std::size_t elements() const;
  // Element i as float32 (i8: the integer, times its row's scale if there are scales).
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
  // ranges outside the file. Also for a tensor of a dtype that we read whose bytes are not aligned
  // to its element size: writers have aligned them since 2023, and kernels rely on it.
  static absl::StatusOr<Safetensors> open(const std::filesystem::path& file);

  // A Hugging Face folder: model.safetensors, or the shards that model.safetensors.index.json names
  // (only plain file names inside the folder). NotFound when there is neither.
  static absl::StatusOr<Safetensors> open_folder(const std::filesystem::path& folder);

  // Parses a file image that the caller keeps alive: for tests and fuzzing.
  static absl::StatusOr<Safetensors> parse(std::span<const std::byte> image, std::string_view name);

  // In the order of their names; only the dtypes that we read.
  const std::map<std::string, TensorView, std::less<>>& tensors() const { return tensors_; }
  // Tensors of other dtypes (I64 buffers, F8, ...): name -> dtype as written in the file. Their
  // bytes are checked like the others', but not offered: most of them nobody needs.
  const std::map<std::string, std::string, std::less<>>& unread() const { return unread_; }
  const TensorView* find(std::string_view name) const;  // null when absent or unread
  // The tensor of that name and shape. InvalidArgument that shows both sides when it is absent or
  // has another shape; Unimplemented when its dtype is one that we do not read.
  absl::StatusOr<TensorView> get(std::string_view name, std::span<const std::size_t> shape) const;
  const std::map<std::string, std::string, std::less<>>& metadata() const { return metadata_; }

  // Tells the system that the pages of this tensor are not needed for now, so that a pass over a
  // large model does not hold all of it in memory. The view stays valid.
  void release_pages(const TensorView& tensor) const;

  // Tells the system that this tensor will be read soon: it may begin to, without anybody waiting.
  void prefetch(const TensorView& tensor) const;

  // Tells the system that all of this tensor will be read, many times: Linux then reads it from the
  // disk in pages of 2 MB, from which a product streams a sixth faster and which take a fiftieth of
  // the page faults. What the system has cached in small pages stays as it is.
  void expect_streaming(const TensorView& tensor) const;

 private:
  class Mapping;
  absl::Status add_file(const std::filesystem::path& file);
  absl::Status add_image(std::span<const std::byte> image, std::string_view name);
  void advise(const TensorView& tensor, int advice) const;

  std::vector<std::shared_ptr<const Mapping>> mappings_;
  std::map<std::string, TensorView, std::less<>> tensors_;
  std::map<std::string, std::string, std::less<>> unread_;
  std::map<std::string, std::string, std::less<>> metadata_;
};

// Writes a safetensors file tensor by tensor: all names, dtypes and shapes first, then their bytes
// in the order in which they were declared, in pieces of any size. The file is complete after
// finish(); without it, it is removed. The data section starts at a multiple of 64 bytes; inside it
// the format allows no holes, so wider dtypes are best declared first. One thread at a time.
class SafetensorsWriter {
 public:
  struct Declaration {
    std::string name;
    Dtype dtype;
    std::vector<std::size_t> shape;
  };
  // `mode`: permissions of the file, 0600 for a secret one. AlreadyExists when there is such a
  // file; InvalidArgument for a name that is declared twice or a tensor that would start at an
  // address not aligned to its elements.
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> create(
      const std::filesystem::path& file, std::vector<Declaration> tensors,
      const std::map<std::string, std::string, std::less<>>& metadata, unsigned mode = 0644);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // The next bytes of the data section. Errors name the file (ResourceExhausted: the disk is full).
  // Internal for more bytes than were declared.
  absl::Status write(std::span<const std::byte> bytes);
  // Flushes to the disk and closes. Internal when fewer bytes were written than were declared.
  absl::Status finish();

 private:
  SafetensorsWriter() = default;
  absl::Status write_through(std::span<const std::byte> bytes);
  absl::Status flush();

  std::filesystem::path file_;
  int fd_ = -1;
  std::size_t remaining_ = 0;  // declared bytes that are still to come
  std::vector<std::byte> buffer_;
};

}  // namespace infemeral
