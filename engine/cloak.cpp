#include "engine/cloak.h"

#include <fcntl.h>
#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/parallel_for.h>
#include <sodium.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <numbers>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "engine/fingerprint.h"
#include "engine/float16.h"
#include "engine/gemm.h"
#include "engine/json_file.h"
#include "engine/qr.h"
#include "engine/safetensors.h"
#include "engine/text.h"

namespace infemeral {
namespace {

constexpr double kMaxOrthogonalityError = 1e-3;
constexpr std::size_t kMaxHiddenSize = 1 << 16;
constexpr std::size_t kSampledRows = 64;  // checked when a matrix is loaded
constexpr char kTensorName[] = "cloak";

// Domains of the seed: one for what the body may know, one for the matrix.
constexpr std::string_view kCommitmentDomain = "infemeral cloak commitment v1";
constexpr std::string_view kMatrixDomain = "infemeral cloak matrix v1";

void keyed_hash(std::span<const std::uint8_t, 32> seed, std::string_view domain,
                std::span<std::uint8_t, 32> out) {
  crypto_generichash(out.data(), out.size(), seed.data(), seed.size(),
                     reinterpret_cast<const unsigned char*>(domain.data()), domain.size());
}

absl::Status check_private(const struct stat& info, const std::filesystem::path& file) {
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(cat(file.string(), " is not a regular file"));
  }
  if ((info.st_mode & (S_IRWXG | S_IRWXO)) != 0) {
    return absl::PermissionDeniedError(
        cat("others can read the secret file ", file.string(), "; run: chmod 600 ", file.string()));
  }
  return absl::OkStatus();
}

// Wiped when it leaves: holds what the cloak could be recovered from.
class SecretDoubles {
 public:
  explicit SecretDoubles(std::size_t n) : values_(n) {}
  ~SecretDoubles() { sodium_memzero(values_.data(), values_.size() * sizeof(double)); }
  SecretDoubles(const SecretDoubles&) = delete;
  SecretDoubles& operator=(const SecretDoubles&) = delete;
  std::span<double> span() { return values_; }
  double* data() { return values_.data(); }

 private:
  std::vector<double> values_;
};

// Independent standard Gaussians from the keystream, two for two 64-bit words (Box and Muller,
// Ann. Math. Statist. 29, 1958), with uniforms of 53 bits. Element i depends on the key and i
// alone.
void fill_gaussian(std::span<const std::uint8_t, 32> key, std::span<double> out) {
  constexpr std::size_t kChunk = 4096;  // doubles; one keystream word each
  constexpr std::size_t kBlocksPerChunk = kChunk * 8 / 64;
  static constexpr std::uint8_t kNonce[crypto_stream_chacha20_NONCEBYTES] = {};
  const std::size_t chunks = (out.size() + kChunk - 1) / kChunk;
  tbb::parallel_for(tbb::blocked_range<std::size_t>(0, chunks), [&](const auto& range) {
    std::uint64_t words[kChunk];
    for (std::size_t chunk = range.begin(); chunk != range.end(); ++chunk) {
      std::memset(words, 0, sizeof words);
      auto* bytes = reinterpret_cast<unsigned char*>(words);
      crypto_stream_chacha20_xor_ic(bytes, bytes, sizeof words, kNonce, chunk * kBlocksPerChunk,
                                    key.data());
      const std::span<double> part =
          out.subspan(chunk * kChunk, std::min(kChunk, out.size() - chunk * kChunk));
      for (std::size_t i = 0; i < part.size(); i += 2) {
        const double u = static_cast<double>((words[i] >> 11) + 1) * 0x1p-53;  // (0, 1]
        const double v = static_cast<double>(words[i + 1] >> 11) * 0x1p-53;    // [0, 1)
        const double radius = std::sqrt(-2 * std::log(u));
        part[i] = radius * std::cos(2 * std::numbers::pi * v);
        if (i + 1 < part.size()) part[i + 1] = radius * std::sin(2 * std::numbers::pi * v);
      }
    }
    sodium_memzero(words, sizeof words);
  });
}

// max |rows [begin, end) of Q times Q^T - I|, for columns from `from` on; q holds Q in float64.
double rows_error(std::size_t n, const double* q, std::size_t begin, std::size_t end,
                  std::size_t from) {
  const auto stride = static_cast<std::ptrdiff_t>(n);
  const std::size_t columns = n - from;
  std::vector<double> product((end - begin) * columns, 0);
  gemm_add(end - begin, columns, n, 1.0, ConstMatrix{q, stride}.block(begin, 0),
           ConstMatrix{q, stride}.block(from, 0).transposed(), product.data(), columns);
  double worst = 0;
  for (std::size_t i = begin; i < end; ++i) {
    for (std::size_t j = from; j < n; ++j) {
      const double value = product[(i - begin) * columns + j - from];
      const double error = std::fabs(value - (i == j ? 1 : 0));
      if (!(error <= worst)) worst = error;  // NaN counts as the worst
    }
  }
  return worst;
}

}  // namespace

absl::Status check_private_file(const std::filesystem::path& file) {
  struct stat info = {};
  if (::stat(file.c_str(), &info) != 0) return errno_status(errno, "cannot open", file);
  return check_private(info, file);
}

CloakSeed CloakSeed::random() {
  CloakSeed seed;
  // randombytes_buf needs sodium_init, which is safe to call again and from any thread.
  if (sodium_init() < 0) std::terminate();
  randombytes_buf(seed.bytes_.data(), seed.bytes_.size());
  return seed;
}

CloakSeed CloakSeed::from_bytes(std::span<const std::uint8_t, 32> bytes) {
  CloakSeed seed;
  std::copy(bytes.begin(), bytes.end(), seed.bytes_.begin());
  return seed;
}

absl::StatusOr<CloakSeed> CloakSeed::load(const std::filesystem::path& file) {
  const int fd = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno_status(errno, "cannot open", file);
  const absl::Cleanup close_file = [fd] { ::close(fd); };
  struct stat info = {};
  if (::fstat(fd, &info) != 0) return errno_status(errno, "cannot read", file);
  if (absl::Status status = check_private(info, file); !status.ok()) return status;
  CloakSeed seed;
  if (info.st_size != static_cast<off_t>(seed.bytes_.size())) {
    return absl::DataLossError(
        cat(file.string(), " has ", info.st_size, " bytes; a cloak key has 32"));
  }
  std::size_t done = 0;
  while (done < seed.bytes_.size()) {
    const ssize_t n = ::read(fd, seed.bytes_.data() + done, seed.bytes_.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno_status(errno, "cannot read", file);
    if (n == 0) return absl::DataLossError(cat(file.string(), " is cut short"));
    done += static_cast<std::size_t>(n);
  }
  return seed;
}

absl::Status CloakSeed::save(const std::filesystem::path& file) const {
  return write_new_file(file, {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()},
                        S_IRUSR | S_IWUSR);
}

CloakSeed::CloakSeed(CloakSeed&& other) noexcept {
  *this = std::move(other);
}

CloakSeed& CloakSeed::operator=(CloakSeed&& other) noexcept {
  if (this != &other) {
    bytes_ = other.bytes_;
    sodium_memzero(other.bytes_.data(), other.bytes_.size());
  }
  return *this;
}

CloakSeed::~CloakSeed() {
  sodium_memzero(bytes_.data(), bytes_.size());
}

Fingerprint CloakSeed::commitment() const {
  Fingerprint result;
  keyed_hash(bytes_, kCommitmentDomain, result);
  return result;
}

void cloak_gaussians(const CloakSeed& seed, std::span<double> out) {
  std::array<std::uint8_t, 32> key;
  keyed_hash(seed.bytes(), kMatrixDomain, key);
  fill_gaussian(key, out);
  sodium_memzero(key.data(), key.size());
}

absl::StatusOr<Cloak> Cloak::generate(const CloakSeed& seed, std::size_t hidden_size) {
  if (hidden_size == 0 || hidden_size > kMaxHiddenSize) {
    return absl::InvalidArgumentError(
        cat("the cloak's size is ", hidden_size, "; 1 to ", kMaxHiddenSize, " are possible"));
  }
  const std::size_t n = hidden_size;
  SecretDoubles q(n * n);  // column-major: the keystream fills column after column
  cloak_gaussians(seed, q.span());
  orthogonal_factor(n, q.span());
  Cloak cloak;
  cloak.hidden_size_ = n;
  cloak.values_.resize(n * n);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) {
      cloak.values_[i * n + j] = f32_to_f16(static_cast<float>(q.data()[j * n + i]));
    }
  }
  if (const double error = cloak.orthogonality_error(); !(error < kMaxOrthogonalityError)) {
    return absl::InternalError(cat("the cloak of size ", n,
                                   " is not orthogonal: max |QQ^T - I| is ", error, ", allowed is ",
                                   kMaxOrthogonalityError));
  }
  return cloak;
}

absl::StatusOr<Cloak> Cloak::load(const std::filesystem::path& file, const CloakSeed& seed,
                                  std::size_t hidden_size) {
  if (absl::Status status = check_private_file(file); !status.ok()) return status;
  const auto tensors = Safetensors::open(file);
  if (!tensors.ok()) return tensors.status();
  const auto commitment = tensors->metadata().find("cloak_commitment");
  if (commitment == tensors->metadata().end() ||
      commitment->second != fingerprint_text(seed.commitment())) {
    return absl::FailedPreconditionError(
        cat(file.string(),
            " was not made from this folder's cloak.key; delete it and set "
            "cloak_mode to \"lazy\", or restore the key"));
  }
  const std::size_t shape[] = {hidden_size, hidden_size};
  const auto view = tensors->get(kTensorName, shape);
  if (!view.ok() || view->dtype != Dtype::kF16) {
    return absl::FailedPreconditionError(cat(file.string(), ": a tensor '", kTensorName,
                                             "' of F16 and shape [", hidden_size, ", ", hidden_size,
                                             "] is needed; the file belongs to another model"));
  }
  Cloak cloak;
  cloak.hidden_size_ = hidden_size;
  cloak.values_.resize(view->elements());
  std::memcpy(cloak.values_.data(), view->data.data(), view->data.size());

  const std::size_t n = hidden_size, rows = std::min(n, kSampledRows);
  SecretDoubles sample(rows * n);
  for (std::size_t r = 0; r < rows; ++r) {
    const std::size_t row = r * n / rows;
    for (std::size_t j = 0; j < n; ++j) {
      sample.data()[r * n + j] = f16_to_f32(cloak.values_[row * n + j]);
    }
  }
  SecretDoubles product(rows * rows);
  std::fill(product.span().begin(), product.span().end(), 0.0);
  const ConstMatrix rows_view{sample.data(), static_cast<std::ptrdiff_t>(n)};
  gemm_add(rows, rows, n, 1.0, rows_view, rows_view.transposed(), product.data(), rows);
  for (std::size_t i = 0; i < rows; ++i) {
    for (std::size_t j = 0; j < rows; ++j) {
      const double error = std::fabs(product.data()[i * rows + j] - (i == j ? 1 : 0));
      if (!(error < kMaxOrthogonalityError)) {
        return absl::DataLossError(cat(file.string(), " is damaged: its matrix is not orthogonal"));
      }
    }
  }
  return cloak;
}

absl::Status Cloak::save(const std::filesystem::path& file, const CloakSeed& seed) const {
  auto writer = SafetensorsWriter::create(
      file, {{kTensorName, Dtype::kF16, {hidden_size_, hidden_size_}}},
      {{"cloak_commitment", fingerprint_text(seed.commitment())}}, S_IRUSR | S_IWUSR);
  if (!writer.ok()) return writer.status();
  if (absl::Status status = (*writer)->write(std::as_bytes(values())); !status.ok()) return status;
  return (*writer)->finish();
}

Cloak& Cloak::operator=(Cloak&& other) noexcept {
  if (this != &other) {
    sodium_memzero(values_.data(), values_.size() * sizeof(std::uint16_t));
    hidden_size_ = std::exchange(other.hidden_size_, 0);
    values_ = std::move(other.values_);
  }
  return *this;
}

Cloak::~Cloak() {
  sodium_memzero(values_.data(), values_.size() * sizeof(std::uint16_t));
}

double Cloak::orthogonality_error() const {
  const std::size_t n = hidden_size_;
  SecretDoubles q(n * n);
  for (std::size_t i = 0; i < n * n; ++i) q.data()[i] = f16_to_f32(values_[i]);
  constexpr std::size_t kRows = 512;
  double worst = 0;
  for (std::size_t begin = 0; begin < n; begin += kRows) {
    // QQ^T is symmetric: the columns before `begin` were seen.
    const double error = rows_error(n, q.data(), begin, std::min(n, begin + kRows), begin);
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

}  // namespace infemeral
