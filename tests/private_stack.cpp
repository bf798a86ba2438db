#include "tests/private_stack.h"

#include <catch2/catch.hpp>

#include "cpu/client_backend.h"

namespace infemeral {

PrivateStack::PrivateStack(const std::filesystem::path& prepared, int threads) {
  auto folder = ClientFolder::open(prepared / "client");
  INFO(folder.status().ToString());
  REQUIRE(folder.ok());
  manifest = folder->manifest;
  auto opened = make_cpu_client_backend(*std::move(folder), {.threads = threads});
  INFO(opened.status().ToString());
  REQUIRE(opened.ok());
  backend = *std::move(opened);
  auto reached = Endpoint::open({.body_folder = prepared / "body", .threads = threads}, manifest);
  INFO(reached.status().ToString());
  REQUIRE(reached.ok());
  endpoint = *std::move(reached);
  auto connected = endpoint->connect({});
  INFO(connected.status().ToString());
  REQUIRE(connected.ok());
  link = *std::move(connected);
}

}  // namespace infemeral
