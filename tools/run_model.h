// What engine_run generates with: the client's text assets and backend, the link to the body, and
// the pipeline over both.
#pragma once

#include <memory>
#include <optional>
#include <stop_token>
#include <string>

#include "engine/backend.h"
#include "engine/link.h"
#include "engine/pipeline.h"
#include "engine/report.h"
#include "engine/text_generation.h"
#include "tools/console.h"
#include "tools/endpoint.h"
#include "tools/run_options.h"

namespace infemeral {

struct RunModel {
  std::string name;  // of the model's folder, for result lines
  TextAssets assets;
  std::unique_ptr<ClientBackend> backend;
  std::optional<Endpoint> endpoint;
  std::unique_ptr<Link> link;
  std::optional<Pipeline> pipeline;  // destroyed before what it borrows
  SessionInfo session;               // the first, which the pipeline has adopted
  RunDescription description;        // all but load_ms
  RunMemory memory;
};

// Loads the client's folder while a thread of its own connects. An error is a line on the console;
// returns the exit code to end with, or kExitOk when all of `model` is there. `options` have passed
// check_run_options(); `console` outlives the model.
int open_run_model(const RunOptions& options, const Console& console, std::stop_token stop,
                   RunModel& model);

}  // namespace infemeral
