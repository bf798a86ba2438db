// head_modes PREPARED_DIR TEXT_FILE: what every head mode makes of a text, teacher-forced, beside
// the full head: tokens, perplexity, time. The text must not be the one that the subset was counted
// in (engine_prep --token-counts). Prints tables in Markdown.
//
// Position i sees tokens 0..i and predicts token i + 1. Every position goes to all heads in turn,
// each time another one first, so that they share the machine's moods; and before each turn the
// body computes the position again, so that a head finds the caches as it does when text is
// generated.
//
// Perplexity is of the distribution that the head samples from (ClientBackend::logits) at
// temperature 1. The subset head's gives probability 0 to every token outside the subset when it is
// confident; what then follows in the text is impossible to it, and one such position makes the
// perplexity infinite. They are counted apart, and the perplexity of the others is shown beside the
// full head's for the same positions.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/certified_head.h"
#include "engine/json_file.h"
#include "engine/report.h"
#include "engine/subset_head.h"
#include "engine/text_generation.h"
#include "engine/token_subset.h"
#include "tools/backend_select.h"
#include "tools/endpoint.h"

namespace infemeral {
namespace {

constexpr WireDtype kWire = WireDtype::kF16;
constexpr std::array kModes = {HeadMode::kFull, HeadMode::kCertified, HeadMode::kInt8,
                               HeadMode::kSubset};
constexpr std::size_t kFullHead = 0;  // of kModes
constexpr std::array kConfidences = {0.5, 0.7, 0.8, 0.9, 0.95, 0.99};

struct Setting {
  const char* name;
  SamplingParams params;
};
constexpr std::array kSettings = {
    Setting{"greedy", {}}, Setting{"T 0.7, top-p 0.9", {.temperature = 0.7f, .top_p = 0.9f}}};

// What one head did under one setting.
struct Choices {
  std::size_t agreed = 0;
  std::vector<double> de_embed_ms, sample_ms;  // a position each
  std::vector<double> hit_ms, other_ms;        // both phases: the subset's own answers, all others
};

struct Head {
  std::unique_ptr<ClientBackend> backend;
  std::array<Choices, kSettings.size()> choices;
  std::size_t impossible = 0;
  double possible_loss = 0;       // sum of -ln p over the other positions, in nats
  double full_possible_loss = 0;  // the full head's, over the same positions
};

// If tokens were accepted from this confidence on.
struct Threshold {
  std::size_t accepted = 0, other_token = 0, impossible = 0;
};

// -ln of the softmax's probability of a token; infinite when its logit is minus infinity.
double loss_of(const std::vector<float>& logits, std::int32_t token) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float logit : logits) sum += std::exp(logit - max);
  return std::log(sum) + max - logits[static_cast<std::size_t>(token)];
}

class Measurement {
 public:
  absl::Status open(const std::filesystem::path& prepared) {
    const auto client = prepared / "client";
    for (std::size_t h = 0; h < kModes.size(); ++h) {
      auto folder = ClientFolder::open(client);
      if (!folder.ok()) return folder.status();
      manifest_ = folder->manifest;
      auto backend = open_backend(*std::move(folder), {.head = kModes[h]}, {});
      if (!backend.ok()) return backend.status();
      heads_[h].backend = *std::move(backend);
    }
    auto ids = load_token_subset(manifest_, client);
    if (!ids.ok()) return ids.status();
    subset_ = *std::move(ids);
    auto assets = TextAssets::load(client);
    if (!assets.ok()) return assets.status();
    assets_ = *std::move(assets);
    auto endpoint = Endpoint::open({.body_folder = prepared / "body"}, manifest_);
    if (!endpoint.ok()) return endpoint.status();
    endpoint_ = *std::move(endpoint);
    auto link = endpoint_->connect({});
    if (!link.ok()) return link.status();
    link_ = *std::move(link);
    return absl::OkStatus();
  }

  absl::Status measure(std::string_view text) {
    const auto ids = assets_.tokenizer->encode(text, {.add_special_tokens = false});
    if (!ids.ok()) return ids.status();
    for (std::size_t begin = 0; begin + 1 < ids->size(); begin += manifest_.max_context) {
      const std::size_t size = std::min(manifest_.max_context, ids->size() - begin);
      if (auto status = measure_window(std::span(*ids).subspan(begin, size)); !status.ok()) {
        return status;
      }
    }
    return absl::OkStatus();
  }

  void print() const {
    std::printf("%zu positions, subset of %zu of %zu tokens, confidence %g, wire f16, %s\n\n",
                positions_, subset_.size(), manifest_.vocab_size, kSubsetConfidence,
                std::string(heads_[kFullHead].backend->name()).c_str());
    print_choices();
    print_perplexity();
    print_thresholds();
  }

 private:
  // A text of one session.
  absl::Status measure_window(std::span<const std::int32_t> ids) {
    auto session = link_->open_session({});
    if (!session.ok()) return session.status();
    for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
      absl::Status status = measure_position(session->id, ids.first(i + 1), ids[i + 1]);
      if (!status.ok()) return status;
    }
    link_->close_session(session->id);
    return absl::OkStatus();
  }

  // The body's answer to the last token of `history`; asking again gives it again.
  absl::Status run_body(std::uint64_t session, std::span<const std::int32_t> history,
                        StepReply& reply) {
    std::vector<std::byte> tensor(wire_row_bytes(kWire, manifest_.hidden_size));
    PhaseTimes times;
    auto status = heads_[kFullHead].backend->embed(history.last(1), kWire, tensor, times);
    if (!status.ok()) return status;
    return link_->step({.session = session,
                        .start_pos = static_cast<std::uint32_t>(history.size() - 1),
                        .rows = 1,
                        .dtype = kWire,
                        .tensor = tensor,
                        .wanted = Wanted::kLast},
                       {}, reply, times);
  }

  absl::Status measure_position(std::uint64_t session, std::span<const std::int32_t> history,
                                std::int32_t next) {
    ++positions_;
    StepReply reply;
    for (std::size_t s = 0; s < kSettings.size(); ++s) {
      SampleRequest request{
          .params = kSettings[s].params, .position = history.size(), .history = history};
      request.params.seed = 1;
      std::array<std::int32_t, kModes.size()> tokens;
      for (std::size_t turn = 0; turn < heads_.size(); ++turn) {
        const std::size_t h = (turn + positions_) % heads_.size();
        if (auto status = run_body(session, history, reply); !status.ok()) return status;
        ClientBackend& backend = *heads_[h].backend;
        const auto hits_before = backend.head_counters().subset_hits;
        PhaseTimes times;
        auto status =
            backend.next_tokens(reply.tensor, kWire, {&request, 1}, {&tokens[h], 1}, times);
        if (!status.ok()) return status;
        Choices& choices = heads_[h].choices[s];
        const bool hit = backend.head_counters().subset_hits > hits_before;
        (hit ? choices.hit_ms : choices.other_ms).push_back(times.de_embed_ms + times.sample_ms);
        choices.de_embed_ms.push_back(times.de_embed_ms);
        choices.sample_ms.push_back(times.sample_ms);
      }
      for (std::size_t h = 0; h < heads_.size(); ++h) {
        heads_[h].choices[s].agreed += tokens[h] == tokens[kFullHead];
      }
    }
    double full_loss = 0;
    std::vector<float> logits(manifest_.vocab_size);
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      auto status = heads_[h].backend->logits(reply.tensor, kWire, logits);
      if (!status.ok()) return status;
      const double loss = loss_of(logits, next);
      if (h == kFullHead) {
        full_loss = loss;
        count_thresholds(logits, next);
      }
      if (std::isinf(loss)) {
        ++heads_[h].impossible;
      } else {
        heads_[h].possible_loss += loss;
        heads_[h].full_possible_loss += full_loss;
      }
    }
    return absl::OkStatus();
  }

  void count_thresholds(const std::vector<float>& logits, std::int32_t next) {
    std::vector<float> scores;
    for (std::int32_t id : subset_) scores.push_back(logits[static_cast<std::size_t>(id)]);
    const double confidence = subset_confidence(scores, {});
    const auto inside = [&](std::int32_t id) {
      return std::binary_search(subset_.begin(), subset_.end(), id);
    };
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    for (std::size_t t = 0; t < kConfidences.size(); ++t) {
      if (confidence < kConfidences[t]) continue;
      ++thresholds_[t].accepted;
      thresholds_[t].other_token += !inside(static_cast<std::int32_t>(best));
      thresholds_[t].impossible += !inside(next);
    }
  }

  double percent(std::size_t count) const {
    return 100 * static_cast<double>(count) / static_cast<double>(positions_);
  }

  void print_choices() const {
    std::printf(
        "| sampling | head | tokens as the full head's | hit rate | de_embed + sample, median ms "
        "|\n|---|---|---|---|---|\n");
    for (std::size_t s = 0; s < kSettings.size(); ++s) {
      for (std::size_t h = 0; h < heads_.size(); ++h) {
        const Choices& c = heads_[h].choices[s];
        std::printf("| %s | %s | %zu, %.2f %% | ", kSettings[s].name,
                    std::string(head_mode_name(kModes[h])).c_str(), c.agreed, percent(c.agreed));
        if (kModes[h] == HeadMode::kSubset) std::printf("%.2f %% ", percent(c.hit_ms.size()));
        std::printf("| %.2f + %.2f", summarize(c.de_embed_ms).median,
                    summarize(c.sample_ms).median);
        if (kModes[h] == HeadMode::kSubset) {
          std::printf("; a hit %.2f, a miss %.2f", summarize(c.hit_ms).median,
                      summarize(c.other_ms).median);
        }
        std::printf(" |\n");
      }
    }
  }

  void print_perplexity() const {
    std::printf(
        "\n| head | impossible positions | perplexity of the others | the full head's, there |\n"
        "|---|---|---|---|\n");
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      const auto possible = static_cast<double>(positions_ - heads_[h].impossible);
      std::printf("| %s | %zu, %.2f %% | %.4f | %.4f |\n",
                  std::string(head_mode_name(kModes[h])).c_str(), heads_[h].impossible,
                  percent(heads_[h].impossible), std::exp(heads_[h].possible_loss / possible),
                  std::exp(heads_[h].full_possible_loss / possible));
    }
  }

  void print_thresholds() const {
    std::printf(
        "\n| confidence | accepted, greedy | of these another token than the full head's | "
        "impossible positions |\n|---|---|---|---|\n");
    for (std::size_t t = 0; t < kConfidences.size(); ++t) {
      const Threshold& threshold = thresholds_[t];
      std::printf("| %g | %.2f %% | %zu | %zu |\n", kConfidences[t], percent(threshold.accepted),
                  threshold.other_token, threshold.impossible);
    }
  }

  ClientManifest manifest_;
  std::array<Head, kModes.size()> heads_;
  std::vector<std::int32_t> subset_;
  TextAssets assets_;
  std::optional<Endpoint> endpoint_;
  std::unique_ptr<Link> link_;
  std::size_t positions_ = 0;
  std::array<Threshold, kConfidences.size()> thresholds_;
};

}  // namespace
}  // namespace infemeral

int main(int argc, char** argv) {
  using namespace infemeral;
  if (argc != 3) {
    std::fprintf(stderr, "usage: head_modes PREPARED_DIR TEXT_FILE\n");
    return 2;
  }
  const auto fail = [](const absl::Status& status) {
    std::fprintf(stderr, "head_modes: %s\n", std::string(status.message()).c_str());
    return 2;
  };
  const auto text = read_text_file(argv[2], std::size_t{64} << 20);
  if (!text.ok()) return fail(text.status());
  Measurement measurement;
  if (auto status = measurement.open(argv[1]); !status.ok()) return fail(status);
  if (auto status = measurement.measure(*text); !status.ok()) return fail(status);
  measurement.print();
  return 0;
}
