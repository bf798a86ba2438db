// Embeds the engine: body server and client in one program, a prompt in, tokens out.
// usage: consumer PREPARED_DIR
#include <cstdio>
#include <string>

#include "cpu/body.h"
#include "cpu/client_backend.h"
#include "engine/client_folder.h"
#include "engine/pipeline.h"
#include "net/body_server.h"
#include "net/client_link.h"

namespace {

int fail(const absl::Status& status) {
  std::fprintf(stderr, "consumer: %s\n", status.ToString().c_str());
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace infemeral;
  if (argc != 2) return 2;
  const std::string prepared = argv[1];

  auto body = load_cpu_body(prepared + "/body", {});
  if (!body.ok()) return fail(body.status());
  const Identity server_identity = Identity::generate();
  const Identity client_identity = Identity::generate();
  auto server = BodyServer::start(
      **body, {.identity = &server_identity, .allow = {client_identity.public_key()}});
  if (!server.ok()) return fail(server.status());

  auto folder = ClientFolder::open(prepared + "/client");
  if (!folder.ok()) return fail(folder.status());
  ClientLinkOptions options{.server = "127.0.0.1:" + std::to_string((*server)->port()),
                            .server_key = server_identity.public_key(),
                            .identity = &client_identity,
                            .model_fingerprint = folder->manifest.model_fingerprint,
                            .cloak_commitment = folder->manifest.cloak_commitment,
                            .hidden_size = folder->manifest.hidden_size};
  auto link = connect_link(options);
  if (!link.ok()) return fail(link.status());
  auto backend = make_cpu_client_backend(*std::move(folder), {});
  if (!backend.ok()) return fail(backend.status());

  Pipeline pipeline(**backend, **link, {});
  GenerateResult result;
  const auto print = [](std::int32_t token) { return std::printf("%d ", token) > 0; };
  const auto status = pipeline.generate({.prompt = {1, 2, 3}, .max_tokens = 8}, print, {}, result);
  if (!status.ok()) return fail(status);
  std::printf("\n%zu tokens\n", result.tokens.size());
  return result.tokens.size() == 8 ? 0 : 1;
}
