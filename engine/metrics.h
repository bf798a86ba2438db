// Where the time and the memory of a token go. All times are wall-clock milliseconds.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace infemeral {

// The phases of one step, in the order in which a token passes through them. A phase that did not
// happen is 0.
struct PhaseTimes {
  double embed_ms = 0;    // table lookup
  double cloak_ms = 0;    // times Q, and into the wire format
  double encode_ms = 0;   // LZ4 decision, protobuf frame
  double encrypt_ms = 0;  // Noise
  // From the first byte handed to gRPC to the last byte back, less body_ms; and, after a break, the
  // time until the server was back.
  double network_ms = 0;
  double body_ms = 0;      // the body's own compute, as it reports it
  double decrypt_ms = 0;   // Noise
  double decode_ms = 0;    // protobuf frame, LZ4, out of the wire format
  double uncloak_ms = 0;   // times Q^T, final norm gain
  double de_embed_ms = 0;  // lm_head
  double sample_ms = 0;

  double sum() const {
    return embed_ms + cloak_ms + encode_ms + encrypt_ms + network_ms + body_ms + decrypt_ms +
           decode_ms + uncloak_ms + de_embed_ms + sample_ms;
  }
};

// The phases' names in reports, in the order of PhaseTimes.
struct PhaseName {
  const char* name;
  double PhaseTimes::*value;
};
inline constexpr std::array<PhaseName, 11> kPhases = {{{"embed", &PhaseTimes::embed_ms},
                                                       {"cloak", &PhaseTimes::cloak_ms},
                                                       {"encode", &PhaseTimes::encode_ms},
                                                       {"encrypt", &PhaseTimes::encrypt_ms},
                                                       {"network", &PhaseTimes::network_ms},
                                                       {"body", &PhaseTimes::body_ms},
                                                       {"decrypt", &PhaseTimes::decrypt_ms},
                                                       {"decode", &PhaseTimes::decode_ms},
                                                       {"uncloak", &PhaseTimes::uncloak_ms},
                                                       {"de_embed", &PhaseTimes::de_embed_ms},
                                                       {"sample", &PhaseTimes::sample_ms}}};

// What was added to `before` since.
PhaseTimes since(const PhaseTimes& before, const PhaseTimes& now);

struct TokenTiming {
  PhaseTimes phases;
  double total_ms = 0;  // measured on its own; the phases must explain at least 80 % of it
};

// Bytes that a backend or a body holds.
struct MemoryUse {
  std::size_t weights_bytes = 0;    // mapped or resident weight data, all kinds
  std::size_t head_copy_bytes = 0;  // of these, what a head mode made for itself: int8 rows, subset
  std::size_t cloak_bytes = 0;
  std::size_t device_peak_bytes = 0;  // 0 on the CPU
};

// What the certified or the subset head did since its backend was made.
struct HeadCounters {
  std::uint64_t tokens = 0;         // chosen in one of these modes, behind wrong guesses too
  std::uint64_t rows_rescored = 0;  // of lm_head, in float16; whole passes are not counted here
  std::uint64_t widenings = 0;      // times that top-p needed more rows than it had rescored
  std::uint64_t full_passes = 0;    // tokens for which the whole float16 head was run instead
  std::uint64_t subset_hits = 0;    // tokens that the subset head was confident of
};

// What crossed a link since it was opened.
struct LinkCounters {
  std::uint64_t bytes_up = 0;  // envelopes as handed to gRPC
  std::uint64_t bytes_down = 0;
  std::uint64_t tensor_bytes_up = 0;  // hidden states in the wire format, before LZ4
  std::uint64_t tensor_bytes_down = 0;
  std::uint64_t packed_bytes_up = 0;  // the same after LZ4, where that paid
  std::uint64_t packed_bytes_down = 0;
  std::uint64_t steps = 0;
  std::uint64_t handshakes = 0;
  std::uint64_t reconnects = 0;  // of these, after the connection had broken
};

// Adds the time since its construction (or the last lap) to a phase.
class PhaseClock {
 public:
  PhaseClock() : last_(std::chrono::steady_clock::now()) {}
  void lap(double& phase_ms) {
    const auto now = std::chrono::steady_clock::now();
    phase_ms += std::chrono::duration<double, std::milli>(now - last_).count();
    last_ = now;
  }

 private:
  std::chrono::steady_clock::time_point last_;
};

// Largest resident set of this process so far, in bytes.
std::size_t peak_rss_bytes();

}  // namespace infemeral
