#include "engine/text_generation.h"

#include <algorithm>

namespace infemeral {
namespace {

std::optional<std::int32_t> special_token(const Tokenizer& tokenizer, std::string_view name) {
  const std::optional<std::int32_t> id = tokenizer.token_id(name);
  return id && tokenizer.is_special(*id) ? id : std::nullopt;
}

}  // namespace

absl::StatusOr<TextAssets> TextAssets::load(const std::filesystem::path& client_folder) {
  TextAssets assets;
  auto tokenizer = Tokenizer::load(client_folder / "tokenizer.json");
  if (!tokenizer.ok()) return tokenizer.status();
  assets.tokenizer = *std::move(tokenizer);
  // A model without a usable template is fine until a chat is asked for.
  assets.chat_template = ChatTemplate::load(client_folder / "tokenizer_config.json");
  if (assets.chat_template.ok()) {
    assets.end_of_turn = special_token(*assets.tokenizer, assets.chat_template->end_of_turn());
  }
  auto defaults = load_generation_config(client_folder);
  if (!defaults.ok()) return defaults.status();
  assets.defaults = *std::move(defaults);
  return assets;
}

absl::StatusOr<std::vector<std::int32_t>> TextAssets::encode_prompt(std::string_view prompt) const {
  return tokenizer->encode(prompt);
}

absl::StatusOr<std::vector<std::int32_t>> TextAssets::encode_chat(
    std::span<const ChatMessage> messages) const {
  if (!chat_template.ok()) return chat_template.status();
  return chat_template->encode(*tokenizer, messages, /*add_generation_prompt=*/true);
}

StopFilter::StopFilter(std::vector<std::string> stops) : stops_(std::move(stops)) {
  std::erase_if(stops_, [](const std::string& stop) { return stop.empty(); });
}

std::string StopFilter::push(std::string_view text) {
  if (stopped_) return {};
  held_.append(text);
  std::size_t cut = std::string::npos;
  for (const std::string& stop : stops_) cut = std::min(cut, held_.find(stop));
  if (cut != std::string::npos) {
    stopped_ = true;
    std::string shown = held_.substr(0, cut);
    held_.clear();
    return shown;
  }
  std::size_t hold = 0;  // the longest end of the text that begins a stop string
  for (const std::string& stop : stops_) {
    for (std::size_t n = std::min(stop.size() - 1, held_.size()); n > hold; --n) {
      if (std::string_view(held_).substr(held_.size() - n) == std::string_view(stop).substr(0, n)) {
        hold = n;
      }
    }
  }
  // Whole characters only: do not part a stop string's first bytes from those before them.
  while (hold < held_.size() && (held_[held_.size() - hold] & 0xC0) == 0x80 && hold > 0) ++hold;
  std::string shown = held_.substr(0, held_.size() - hold);
  held_.erase(0, shown.size());
  return shown;
}

std::string StopFilter::finish() {
  return stopped_ ? std::string() : std::exchange(held_, {});
}

TextJob::TextJob(const TextAssets& assets, TextRequest request, TextCallback on_text)
    : decoder_(*assets.tokenizer, /*skip_special_tokens=*/true),
      filter_(request.stop),
      on_text_(std::move(on_text)) {
  job.request = {.prompt = std::move(request.prompt),
                 .max_tokens = request.max_tokens,
                 .sampling = request.sampling};
  std::vector<std::int32_t>& ends = job.request.end_tokens;
  if (!request.ignore_end_tokens) {
    ends = assets.defaults.end_tokens;
    // A chat's answer is a turn, also where generation_config.json names the base model's end token
    // alone. Text holds no control tokens, so a prompt that ends a turn is a chat.
    const std::vector<std::int32_t>& prompt = job.request.prompt;
    if (assets.end_of_turn &&
        std::find(prompt.begin(), prompt.end(), *assets.end_of_turn) != prompt.end()) {
      ends.push_back(*assets.end_of_turn);
    }
  }
  // The decoder leaves special tokens out of the text, where the filter would look for them.
  for (const std::string& stop : request.stop) {
    if (const auto id = special_token(*assets.tokenizer, stop)) ends.push_back(*id);
  }
  job.on_token = [this](std::int32_t token) { return push(token); };
  job.result = &result.generation;
}

void TextJob::show(std::string piece) {
  if (piece.empty()) return;
  result.text += piece;
  if (on_text_) on_text_(piece);
}

bool TextJob::push(std::int32_t token) {
  show(filter_.push(decoder_.push(token)));
  return !filter_.stopped();
}

void TextJob::finish() {
  show(filter_.push(decoder_.finish()));
  show(filter_.finish());
  result.stopped = filter_.stopped() || result.generation.finish == FinishReason::kEndToken;
}

absl::Status generate_text(Pipeline& pipeline, const TextAssets& assets, const TextRequest& request,
                           const TextCallback& on_text, std::stop_token stop, TextResult& result) {
  TextJob text(assets, request, on_text);
  const absl::Status status =
      pipeline.generate(text.job.request, text.job.on_token, stop, text.result.generation);
  text.finish();
  result = std::move(text.result);
  return status;
}

}  // namespace infemeral
