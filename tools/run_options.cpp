#include "tools/run_options.h"

#include <filesystem>
#include <optional>
#include <system_error>

#include "engine/cloak_noise.h"
#include "engine/pipeline.h"
#include "tools/cli.h"

namespace infemeral {

void add_run_flags(CLI::App& app, RunOptions& o) {
  const auto option = [&](const std::string& flags, auto& value, const std::string& help) {
    return with_env(app.add_option(flags, value, help));
  };
  // Else the parser takes "[a, b]" for a list, and words behind the text for more texts.
  const auto texts = [&](const std::string& flags, auto& value, const std::string& help) {
    return option(flags, value, help)->allow_extra_args(false);
  };
  const auto flag = [&](const std::string& flags, bool& value, const std::string& help) {
    return with_env(app.add_flag(flags, value, help));
  };
  option("-m,--model", o.model, "Folder that engine_prep wrote (or its client folder)")->required();
  option("--server", o.server, "HOST:PORT of engine_serve, or \"local\"")->capture_default_str();
  option("--server-key", o.server_key, "The server's public key, or a file that holds it");
  option("--identity", o.identity, "This client's secret key file, from engine_keygen");
  option("--tls-ca", o.tls.ca,
         "Speak TLS underneath the encrypted channel, to a server with a certificate of these CAs "
         "(PEM)");
  option("--tls-cert", o.tls.cert,
         "A certificate chain to show to a server that asks for it (PEM)");
  option("--tls-key", o.tls.key, "The certificate's private key (PEM)");
  const CLI::Range seconds(0.001, 86400.0);
  option("--connect-timeout", o.connect_timeout, "Seconds to reach the server and shake hands")
      ->check(seconds)
      ->capture_default_str();
  option("--step-timeout", o.step_timeout, "Seconds that the server may take for one answer")
      ->check(seconds)
      ->capture_default_str();
  option("--retry", o.retry,
         "Attempts to connect again when the line breaks, or to ask a full server again; the text "
         "goes "
         "on where it was. 0: none")
      ->check(whole_number())
      ->capture_default_str();
  option("--retry-max-time", o.retry_max_time, "Seconds after a break in which attempts begin")
      ->check(seconds)
      ->capture_default_str();
  auto* prompt = texts("-p,--prompt", o.prompts, "A prompt; may be given several times");
  auto* file = option("-f,--file", o.input_file,
                      "Prompts: text (one a line), JSON lines or OpenAI batch lines; - for stdin");
  prompt->excludes(file);
  option("-o,--output", o.output_file, "Result lines as JSON; - for stdout");
  auto* overwrite = flag("--overwrite", o.overwrite, "Replace an existing output file");
  flag("-c,--continue", o.resume,
       "Keep the result lines of an existing output file and run the prompts that have none")
      ->excludes(overwrite);
  option("--parallel", o.parallel,
         "Prompts that are generated at the same time; result lines come as they are done")
      ->check(CLI::Range(1u, 256u))
      ->capture_default_str();
  option("--draft-max", o.max_draft,
         "Guess up to so many tokens ahead from what the text has said before; the tokens stay the "
         "same, in fewer round trips where it repeats itself. 0: none")
      ->check(CLI::Range(0u, kMaxDraft))
      ->capture_default_str();
  option("--report", o.report_file, "Write a JSON report of the run");
  option("-n,--max-tokens", o.max_tokens, "Tokens to generate for a prompt")
      ->check(whole_number())
      ->capture_default_str();
  option("--temp", o.sampling.temperature, "Temperature; 0 is greedy (default: the model's own)");
  option("--top-k", o.sampling.top_k, "Keep the k likeliest tokens; 0 is off")
      ->check(whole_number());
  option("--top-p", o.sampling.top_p, "Keep the likeliest tokens up to this probability");
  option("--min-p", o.sampling.min_p, "Drop tokens below this share of the likeliest one's");
  option("--repeat-penalty", o.sampling.repetition_penalty, "Repetition penalty; 1 is off");
  option("-s,--seed", o.sampling.seed, "The same seed gives the same tokens (default: 0)")
      ->check(whole_number());
  texts("--stop", o.sampling.stop, "End at this text or special token; may be given several times");
  flag("--ignore-eos", o.ignore_end_tokens, "Go on after the model's end token");
  flag("--chat", o.chat, "Prompts are user messages: apply the model's chat template");
  option("--backend", o.backend, "auto, cpu or cuda")->capture_default_str();
  option("--gpu-memory", o.gpu_memory,
         "Float16 weights on the GPU (full) or in host memory (split); auto: full where it fits")
      ->capture_default_str();
  option("-t,--threads", o.threads, "Threads; 0 is one for each physical core")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  option("--head", o.head,
         "certified: the full head's tokens from an int8 product and a proof; full: the float16 "
         "product; int8: the int8 product without the proof; subset: the most frequent tokens "
         "where they seem enough, without proof (engine_prep --token-counts)")
      ->capture_default_str();
  option("--cloak-noise", o.cloak_noise,
         "Add Gaussian noise of this share of a cloaked row's size; costs accuracy, hides little")
      ->check(CLI::Range(0.0f, kMaxCloakNoise))
      ->capture_default_str();
  option("--wire", o.wire, "Hidden states on the wire: f32, f16 or i8")->capture_default_str();
  flag("--pad", o.pad,
       "Round message sizes up, so that they tell less about a prompt's length; costs bandwidth");
  flag("--profile", o.profile, "Print where a token's time goes; the report holds every token");
  flag("--stream", o.stream, "Print text on stdout as it is made");
  flag("--quiet", o.quiet, "Errors only on stderr");
  flag("--check", o.check, "Connect, generate one token, print what was found, and end");
  add_version(app);
}

absl::Status check_run_options(RunOptions& options) {
  const std::optional<WireDtype> wire = parse_wire_dtype(options.wire);
  if (!wire) return absl::InvalidArgumentError("--wire must be f32, f16 or i8");
  options.wire_dtype = *wire;
  const std::optional<HeadMode> head = parse_head_mode(options.head);
  if (!head) return absl::InvalidArgumentError("--head must be certified, full, int8 or subset");
  options.head_mode = *head;
  // Here and not once for every prompt: an item has errors of its own.
  if (auto status = validate(sampling_for({}, options.sampling, {})); !status.ok()) return status;
  if (options.max_tokens == 0) return absl::InvalidArgumentError("--max-tokens must be at least 1");
  std::error_code ignored;
  if (!options.report_file.empty() && !options.output_file.empty() &&
      (options.report_file == options.output_file ||
       std::filesystem::equivalent(options.report_file, options.output_file, ignored))) {
    return absl::InvalidArgumentError("--report and --output must be two files");
  }
  for (const std::string& stop : options.sampling.stop) {
    if (stop.empty()) return absl::InvalidArgumentError("--stop must not be empty");
  }
  return absl::OkStatus();
}

SamplingParams sampling_for(const SamplingParams& model, const ItemOptions& command_line,
                            const ItemOptions& item) {
  SamplingParams p = model;
  for (const ItemOptions* o : {&command_line, &item}) {
    p.temperature = o->temperature.value_or(p.temperature);
    p.top_k = o->top_k.value_or(p.top_k);
    p.top_p = o->top_p.value_or(p.top_p);
    p.min_p = o->min_p.value_or(p.min_p);
    p.repetition_penalty = o->repetition_penalty.value_or(p.repetition_penalty);
    p.seed = o->seed.value_or(p.seed);
  }
  return p;
}

}  // namespace infemeral
