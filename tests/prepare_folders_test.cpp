// The folders that engine_prep writes, and the models and moments at which it writes none.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <set>

#include "cpu/prepare.h"
#include "engine/json_file.h"
#include "engine/text.h"
#include "tests/prepare_fixture.h"
#include "tests/tiny_model.h"

namespace infemeral {
namespace {

namespace fs = std::filesystem;

struct Logs {
  std::vector<std::pair<LogLevel, std::string>> lines;
  LogSink sink() {
    return [this](LogLevel level, std::string_view message) { lines.emplace_back(level, message); };
  }
  bool has(LogLevel level, std::string_view part) const {
    return std::any_of(lines.begin(), lines.end(), [&](const auto& line) {
      return line.first == level && line.second.find(part) != std::string::npos;
    });
  }
};

std::set<std::string> names_in(const fs::path& folder) {
  std::set<std::string> names;
  if (!fs::exists(folder)) return names;
  for (const auto& entry : fs::directory_iterator(folder)) names.insert(entry.path().filename());
  return names;
}

}  // namespace

TEST_CASE("the folders hold what they should and nothing else") {
  const TempFolder temp;
  make_tiny_model(temp.path() / "model", {.tied = true});
  const CloakSeed seed = CloakSeed::random();
  Logs logs;
  std::vector<std::string> stages;
  const auto result =
      prepare_model({.model_dir = temp.path() / "model",
                     .output_dir = temp.path() / "a" / "b",
                     .cloak_mode = CloakMode::kLazy,
                     .seed = &seed,
                     .log = logs.sink(),
                     .progress = [&](std::string_view stage, double done, double total) {
                       CHECK(done >= 0);
                       CHECK(done <= total);
                       if (stages.empty() || stages.back() != stage) {
                         stages.emplace_back(stage);
                       }
                     }});
  REQUIRE(result.ok());
  const fs::path out = temp.path() / "a" / "b";
  CHECK(names_in(out) == std::set<std::string>{"body", "client"});
  CHECK(names_in(out / "body") ==
        std::set<std::string>{"config.json", "infemeral.json", "model.safetensors"});
  CHECK(names_in(out / "client") ==
        std::set<std::string>{"client.safetensors", "cloak.key", "engine.json",
                              "generation_config.json", "tokenizer.json", "tokenizer_config.json"});
  CHECK(stages == std::vector<std::string>{"cloak", "client", "body", "check"});
  CHECK(result->saved_bytes == 128 * 64 * 2);
  CHECK(result->client_bytes == 128 * 64 * 2 + 64 * 4);
  CHECK(logs.has(LogLevel::kInfo, "MB"));

  nlohmann::json config, manifest;
  std::ifstream(out / "body" / "config.json") >> config;
  std::ifstream(out / "body" / "infemeral.json") >> manifest;
  CHECK(config["vocab_size"] == 1);
  CHECK(config["tie_word_embeddings"] == true);
  CHECK(config["torch_dtype"] == "float16");
  for (const char* name : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
    CHECK(config[name].is_null());
  }
  CHECK(manifest["format_version"] == 1);
  CHECK(manifest["body_dtype"] == "F16");
  CHECK(manifest["cloak_commitment"] == fingerprint_text(seed.commitment()));
  CHECK(manifest["model_fingerprint"] == fingerprint_text(result->model_fingerprint));
  CHECK(manifest.size() == 4);

  const auto body = Safetensors::open_folder(out / "body");
  REQUIRE(body.ok());
  const std::size_t one_row[] = {1, 64};
  const auto embed = body->get("model.embed_tokens.weight", one_row);
  REQUIRE(embed.ok());
  for (const double value : values_of(*embed)) CHECK(value == 0);
  for (const auto& [name, view] : body->tensors()) {
    CHECK(view.dtype == Dtype::kF16);
    if (name.find("norm.weight") == std::string::npos) continue;
    for (const double value : values_of(view)) CHECK(value == 1);
  }
  CHECK(body->find("lm_head.weight") == nullptr);

  const auto client = load_client_manifest(out / "client");
  REQUIRE(client.ok());
  CHECK(client->cloak_mode == CloakMode::kLazy);
  CHECK(client->model_fingerprint == result->model_fingerprint);
  CHECK(client->max_context == 256);
}

TEST_CASE("the end token comes from config.json when generation_config.json does not name it") {
  const auto prepared_config = [](const char* generation_config) {
    TempFolder temp;
    make_tiny_model(temp.path() / "model", {});  // config.json: eos_token_id 2
    fs::remove(temp.path() / "model" / "generation_config.json");
    if (generation_config != nullptr) {
      std::ofstream(temp.path() / "model" / "generation_config.json") << generation_config;
    }
    REQUIRE(prepare_model({.model_dir = temp.path() / "model", .output_dir = temp.path() / "out"})
                .ok());
    std::ifstream file(temp.path() / "out" / "client" / "generation_config.json");
    return nlohmann::json::parse(file);
  };
  CHECK(prepared_config(nullptr)["eos_token_id"] == 2);
  CHECK(prepared_config("{\"do_sample\": true}") ==
        nlohmann::json{{"do_sample", true}, {"eos_token_id", 2}});
  CHECK(prepared_config("{\"eos_token_id\": [5, 6]}")["eos_token_id"] ==
        nlohmann::json::array({5, 6}));
}

TEST_CASE("a body larger than a shard becomes shards with an index") {
  const TempFolder temp;
  make_tiny_model(temp.path() / "model", {});
  const CloakSeed seed = CloakSeed::random();
  const std::size_t max_bytes = 40000;
  for (const auto& [out, size] :
       {std::pair("one", std::size_t{4'000'000'000}), std::pair("many", max_bytes)}) {
    REQUIRE(prepare_model({.model_dir = temp.path() / "model",
                           .output_dir = temp.path() / out,
                           .seed = &seed,
                           .max_shard_bytes = size})
                .ok());
  }
  const auto one = Safetensors::open_folder(temp.path() / "one" / "body");
  const auto many = Safetensors::open_folder(temp.path() / "many" / "body");
  REQUIRE(one.ok());
  REQUIRE(many.ok());
  REQUIRE(one->tensors().size() == many->tensors().size());
  for (const auto& [name, view] : one->tensors()) {
    const auto other = many->get(name, view.shape);
    REQUIRE(other.ok());
    CHECK(std::ranges::equal(view.data, other->data));
  }
  std::size_t shards = 0;
  for (const auto& entry : fs::directory_iterator(temp.path() / "many" / "body")) {
    if (entry.path().extension() != ".safetensors") continue;
    ++shards;
    CHECK(entry.file_size() < max_bytes + 8192);
  }
  CHECK(shards > 2);
}

TEST_CASE("tied embeddings are found by comparing the tensors") {
  const TempFolder temp;
  const fs::path model = temp.path() / "model";
  make_tiny_model(model, {});  // untied, says so
  int n = 0;
  Logs logs;
  const auto prepare = [&] {
    logs.lines.clear();
    return prepare_model(
        {.model_dir = model, .output_dir = temp.path() / std::to_string(n++), .log = logs.sink()});
  };
  const auto set_config = [&](bool tied) {
    nlohmann::json config;
    std::ifstream(model / "config.json") >> config;
    config["tie_word_embeddings"] = tied;
    std::ofstream(model / "config.json") << config;
  };
  CHECK_FALSE(prepare()->tied_embeddings);

  // The configuration says tied, the tensors differ: both are kept, with a word.
  set_config(true);
  CHECK_FALSE(prepare()->tied_embeddings);
  CHECK(logs.has(LogLevel::kWarning, "tie_word_embeddings"));

  // The same values, whatever the configuration says.
  std::vector<float> embed;
  edit_model(model, [&](const std::string& name, std::vector<float>& values) {
    if (name == "lm_head.weight") embed = values;
  });
  edit_model(model, [&](const std::string& name, std::vector<float>& values) {
    if (name == "model.embed_tokens.weight") values = embed;
  });
  set_config(false);
  const auto tied = prepare();
  REQUIRE(tied.ok());
  CHECK(tied->tied_embeddings);
  CHECK(logs.has(LogLevel::kInfo, "saves"));

  // One value in the last place.
  edit_model(model, [&](const std::string& name, std::vector<float>& values) {
    if (name == "lm_head.weight") values.back() = std::nextafter(values.back(), 100.0f);
  });
  CHECK_FALSE(prepare()->tied_embeddings);

  // No lm_head: the configuration decides, and must not contradict.
  edit_model(model, [](const std::string&, std::vector<float>&) {}, {"lm_head.weight"});
  const absl::Status incomplete = prepare().status();
  CHECK(absl::IsInvalidArgument(incomplete));
  CHECK(std::string(incomplete.message()).find("lm_head.weight") != std::string::npos);
  set_config(true);
  CHECK(prepare()->tied_embeddings);
}

TEST_CASE("the fingerprint is the model's: not the files', not the cloak's") {
  const TempFolder temp;
  make_tiny_model(temp.path() / "single", {.tied = true, .seed = 5});
  make_tiny_model(temp.path() / "sharded", {.tied = true, .sharded = true, .seed = 5});
  make_tiny_model(temp.path() / "other", {.tied = true, .seed = 6});
  make_tiny_model(temp.path() / "eps",
                  {.tied = true, .seed = 5, .config_patch = R"({"rms_norm_eps": 1e-6})"});
  std::vector<Fingerprint> prints;
  for (const char* name : {"single", "sharded", "other", "eps"}) {
    const auto result =
        prepare_model({.model_dir = temp.path() / name, .output_dir = temp.path() / "out" / name});
    REQUIRE(result.ok());
    prints.push_back(result->model_fingerprint);
  }
  CHECK(prints[0] == prints[1]);
  CHECK(prints[0] != prints[2]);
  CHECK(prints[0] != prints[3]);
}

TEST_CASE("values that a dtype cannot hold are reported, and nothing is left behind") {
  const TempFolder temp;
  const fs::path model = temp.path() / "model", out = temp.path() / "out";
  make_tiny_model(model, {});
  edit_model(model, [](const std::string& name, std::vector<float>& values) {
    if (name == "model.embed_tokens.weight") values[7] = values[9] = -70123.0f;
  });
  absl::Status status = prepare_model({.model_dir = model, .output_dir = out}).status();
  CHECK(absl::IsInvalidArgument(status));
  std::string message(status.message());
  CHECK(message.find("model.embed_tokens.weight") != std::string::npos);
  CHECK(message.find("2 values") != std::string::npos);
  CHECK(message.find("70123") != std::string::npos);
  CHECK_FALSE(fs::exists(out));

  fs::remove_all(model);
  make_tiny_model(model, {});
  edit_model(model, [](const std::string& name, std::vector<float>& values) {
    if (name == "model.layers.1.mlp.down_proj.weight") values[5] = 1e9f;
  });
  status = prepare_model({.model_dir = model, .output_dir = out}).status();
  CHECK(absl::IsInvalidArgument(status));
  message = std::string(status.message());
  CHECK(message.find("model.layers.1.mlp.down_proj.weight") != std::string::npos);
  CHECK(message.find("F16") != std::string::npos);
  CHECK_FALSE(fs::exists(out));
  CHECK(prepare_model({.model_dir = model, .output_dir = out, .body_dtype = Dtype::kF32}).ok());
}

TEST_CASE("what exists is not overwritten, unless it is ours and asked for") {
  const TempFolder temp;
  const fs::path model = temp.path() / "model", out = temp.path() / "out";
  make_tiny_model(model, {});
  const auto prepare = [&](bool overwrite) {
    return prepare_model({.model_dir = model, .output_dir = out, .overwrite = overwrite});
  };
  REQUIRE(prepare(false).ok());
  std::string key = *read_text_file(out / "client" / "cloak.key", 100);
  CHECK(absl::IsAlreadyExists(prepare(false).status()));
  CHECK(*read_text_file(out / "client" / "cloak.key", 100) == key);
  REQUIRE(prepare(true).ok());
  CHECK(*read_text_file(out / "client" / "cloak.key", 100) != key);
  CHECK(names_in(out) == std::set<std::string>{"body", "client"});

  fs::remove(out / "body" / "infemeral.json");
  std::ofstream(out / "body" / "precious") << "data";
  CHECK(absl::IsAlreadyExists(prepare(true).status()));
  CHECK(fs::exists(out / "body" / "precious"));
}

TEST_CASE("an interrupted preparation leaves nothing, at whatever moment it stops") {
  const TempFolder temp;
  const fs::path model = temp.path() / "model", out = temp.path() / "out";
  make_tiny_model(model, {});
  int calls = 0;
  REQUIRE(prepare_model({.model_dir = model,
                         .output_dir = out,
                         .progress = [&](std::string_view, double, double) { ++calls; }})
              .ok());
  fs::remove_all(out);
  for (int stop_at = 0; stop_at < calls; ++stop_at) {
    std::stop_source source;
    int call = 0;
    const absl::Status status = prepare_model({.model_dir = model,
                                               .output_dir = out,
                                               .progress =
                                                   [&](std::string_view, double, double) {
                                                     if (call++ == stop_at) source.request_stop();
                                                   },
                                               .stop = source.get_token()})
                                    .status();
    INFO(stop_at);
    CHECK(absl::IsCancelled(status));
    CHECK_FALSE(fs::exists(out));
  }
}

TEST_CASE("a layer that adds nothing, as in a model that was made deeper, passes the check") {
  TempFolder temp;
  make_tiny_model(temp.path() / "model", {.seed = std::random_device{}()});
  edit_model(temp.path() / "model", [](const std::string& name, std::vector<float>& values) {
    if (name == "model.layers.1.self_attn.o_proj.weight" ||
        name == "model.layers.1.mlp.down_proj.weight") {
      std::fill(values.begin(), values.end(), 0.0f);
    }
  });
  const auto made =
      prepare_model({.model_dir = temp.path() / "model", .output_dir = temp.path() / "out"});
  INFO(made.status());
  CHECK(made.ok());
}

TEST_CASE("bad models are refused with their reason, before anything is written") {
  struct Case {
    const char* what;
    std::function<void(const fs::path&)> spoil;
    const char* message;
  };
  const Case cases[] = {
      {"no weights", [](const fs::path& m) { fs::remove(m / "model.safetensors"); },
       "model.safetensors"},
      {"no config", [](const fs::path& m) { fs::remove(m / "config.json"); }, "config.json"},
      {"no tokenizer", [](const fs::path& m) { fs::remove(m / "tokenizer.json"); },
       "tokenizer.json"},
      {"cut weights", [](const fs::path& m) { fs::resize_file(m / "model.safetensors", 9000); },
       "model.safetensors"},
      {"a layer's tensor is missing",
       [](const fs::path& m) {
         edit_model(m, [](const std::string&, std::vector<float>&) {},
                    {"model.layers.1.self_attn.o_proj.weight"});
       },
       "model.layers.1.self_attn.o_proj.weight"},
      {"NaN in a weight",
       [](const fs::path& m) {
         edit_model(m, [](const std::string& name, std::vector<float>& values) {
           if (name == "model.layers.0.mlp.up_proj.weight") values[0] = NAN;
         });
       },
       "model.layers.0.mlp.up_proj.weight"},
  };
  for (const Case& c : cases) {
    INFO(c.what);
    const TempFolder temp;
    make_tiny_model(temp.path() / "model", {});
    c.spoil(temp.path() / "model");
    const absl::Status status =
        prepare_model({.model_dir = temp.path() / "model", .output_dir = temp.path() / "out"})
            .status();
    INFO(status.ToString());
    CHECK_FALSE(status.ok());
    CHECK_FALSE(absl::IsInternal(status));
    CHECK(std::string(status.message()).find(c.message) != std::string::npos);
    CHECK_FALSE(fs::exists(temp.path() / "out"));
  }
  const TempFolder temp;
  make_tiny_model(temp.path() / "model", {});
  std::ofstream(temp.path() / "file") << "x";
  CHECK_FALSE(
      prepare_model({.model_dir = temp.path() / "model", .output_dir = temp.path() / "file"}).ok());
}

TEST_CASE("tensors that are no part of the model are named, and left out") {
  const TempFolder temp;
  make_tiny_model(temp.path() / "model", {.model_type = "llama", .biases = true});
  nlohmann::json config;
  std::ifstream(temp.path() / "model" / "config.json") >> config;
  config["mlp_bias"] = false;
  std::ofstream(temp.path() / "model" / "config.json") << config;
  Logs logs;
  REQUIRE(prepare_model({.model_dir = temp.path() / "model",
                         .output_dir = temp.path() / "out",
                         .log = logs.sink()})
              .ok());
  CHECK(logs.has(LogLevel::kWarning, "model.layers.1.mlp.down_proj.bias"));
}

}  // namespace infemeral
