#include "perf/line_sweep.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <exception>
#include <optional>
#include <system_error>
#include <utility>

#include "engine/text.h"
#include "perf/case_recorder.h"
#include "tests/line.h"

namespace infemeral {
namespace {

constexpr std::uint32_t kSweepTokens = 16;
constexpr std::size_t kMaxPlaces = 32;  // of an axis
constexpr double kMaxRttMs = 1000;
constexpr double kMinBits = 1e5, kMaxBits = 1e11;

// A finite number without a sign, times its suffix.
std::optional<double> read_number(std::string_view text, bool suffixes) {
  double scale = 1;
  if (suffixes && !text.empty()) {
    const std::string_view letters = "kMG";
    const std::size_t at = letters.find(text.back());
    if (at != letters.npos) {
      for (std::size_t i = 0; i <= at; ++i) scale *= 1e3;
      text.remove_suffix(1);
    }
  }
  double value = 0;
  const char* const end = text.data() + text.size();
  const auto [read, error] = std::from_chars(text.data(), end, value, std::chars_format::fixed);
  if (error != std::errc() || read != end || !std::isfinite(value) || std::signbit(value))
    return {};
  return value * scale;
}

}  // namespace

absl::StatusOr<SweepAxes> parse_sweep(std::span<const std::string> words) {
  SweepAxes axes;
  if (words.empty()) return axes;
  for (const std::string& word : words) {
    const std::size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    if (equals == word.npos || (name != "rtt" && name != "bandwidth")) {
      return absl::InvalidArgumentError(
          cat("--sweep takes rtt=0,10,20 (milliseconds) or bandwidth=100M,1G (bits a second), not ",
              quote_name(word)));
    }
    const bool rtt = name == "rtt";
    std::vector<double>& axis = rtt ? axes.rtt_ms : axes.bits_per_second;
    if (!axis.empty()) {
      return absl::InvalidArgumentError(cat("--sweep ", name, " is given twice"));
    }
    for (std::size_t begin = equals + 1, end = 0; end != word.npos; begin = end + 1) {
      end = word.find(',', begin);
      const std::string_view text = std::string_view(word).substr(begin, end - begin);
      const auto value = read_number(text, !rtt);
      const bool good =
          value && (rtt ? *value <= kMaxRttMs : *value >= kMinBits && *value <= kMaxBits);
      if (!good) {
        return absl::InvalidArgumentError(
            cat("--sweep ", name, " takes ",
                rtt ? "milliseconds up to 1000" : "bits a second from 100k to 100G", ", not ",
                quote_name(text)));
      }
      axis.push_back(*value);
    }
    if (axis.size() > kMaxPlaces) {
      return absl::InvalidArgumentError(cat("--sweep ", name, " takes ", kMaxPlaces, " values"));
    }
  }
  if (axes.rtt_ms.empty()) axes.rtt_ms.push_back(0);
  if (axes.bits_per_second.empty()) axes.bits_per_second.push_back(0);
  return axes;
}

absl::StatusOr<std::vector<SweepPoint>> time_sweep(ClientBackend& backend, const SweepRoute& route,
                                                   const SweepAxes& axes, const BenchPlan& plan) {
  const std::uint32_t max_tokens = std::min(plan.max_tokens, kSweepTokens);
  // What must cross the line, both ways: the hidden states as the codec leaves them.
  GenerateResult expected;
  double packed_bits[2] = {};  // of the first token, of all of them
  for (const std::uint32_t tokens : {1u, max_tokens}) {
    const LinkCounters before = route.direct->counters();
    const auto made =
        generate_fresh(backend, *route.direct, plan, plan.long_prompt, tokens, expected);
    if (!made.ok()) return made;
    const LinkCounters after = route.direct->counters();
    packed_bits[tokens > 1] =
        8 * static_cast<double>(after.packed_bytes_up - before.packed_bytes_up +
                                after.packed_bytes_down - before.packed_bytes_down);
  }
  const double token_bits = (packed_bits[1] - packed_bits[0]) / (max_tokens - 1);

  const std::size_t total = axes.rtt_ms.size() * axes.bits_per_second.size();
  std::vector<SweepPoint> points;
  for (const double bits_per_second : axes.bits_per_second) {
    for (const double rtt_ms : axes.rtt_ms) {
      if (plan.progress) {
        plan.progress("sweep", static_cast<double>(points.size()), static_cast<double>(total));
      }
      SweepPoint point{.rtt_ms = rtt_ms,
                       .bits_per_second = bits_per_second,
                       .prompt_tokens = plan.long_prompt.size(),
                       .output_tokens = max_tokens};
      const double ms_per_bit = bits_per_second > 0 ? 1e3 / bits_per_second : 0;
      point.limit_ttft_ms = rtt_ms + packed_bits[0] * ms_per_bit;
      point.limit_tpot_ms = rtt_ms + token_bits * ms_per_bit;

      std::optional<Line> line;
      try {
        line.emplace(LineOptions{
            .target = route.server_port,
            .one_way_delay = std::chrono::microseconds(static_cast<std::int64_t>(500 * rtt_ms)),
            .bytes_per_second = bits_per_second / 8});
      } catch (const std::exception& error) {
        return absl::InternalError(cat("the sweep's relay cannot start: ", error.what()));
      }
      auto link = route.connect(line->port());
      if (!link.ok()) return link.status();
      BenchPlan quiet = plan;
      quiet.progress = nullptr;
      const auto status = repeat(quiet, "sweep", [&](bool measured) -> absl::Status {
        GenerateResult generated;
        const auto made =
            generate_fresh(backend, **link, plan, plan.long_prompt, max_tokens, generated);
        if (!made.ok()) return made;
        if (generated.tokens != expected.tokens) {
          return absl::InternalError("over a slow line the same prompt gave other tokens");
        }
        if (!measured) return absl::OkStatus();
        point.ttft_ms.push_back(generated.ttft_ms);
        point.tpot_ms.push_back((generated.e2el_ms - generated.ttft_ms) /
                                static_cast<double>(max_tokens - 1));
        return absl::OkStatus();
      });
      if (!status.ok()) return status;
      points.push_back(std::move(point));
    }
  }
  return points;
}

}  // namespace infemeral
