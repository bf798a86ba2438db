// What the tests of engine_prep's mathematics and of its folders both need.
#pragma once

#include <catch2/catch.hpp>
#include <filesystem>
#include <functional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "engine/safetensors.h"

namespace infemeral {

inline std::vector<double> values_of(const TensorView& tensor) {
  std::vector<float> values(tensor.elements());
  tensor.read(0, values);
  return {values.begin(), values.end()};
}

// Rewrites a checkpoint's single file with some tensors changed.
inline void edit_model(const std::filesystem::path& model,
                       const std::function<void(const std::string&, std::vector<float>&)>& edit,
                       const std::set<std::string>& drop = {}) {
  const std::filesystem::path file = model / "model.safetensors",
                              edited = model / "edited.safetensors";
  {
    const auto tensors = Safetensors::open(file);
    REQUIRE(tensors.ok());
    std::vector<SafetensorsWriter::Declaration> declarations;
    for (const auto& [name, view] : tensors->tensors()) {
      if (!drop.contains(name)) declarations.push_back({name, Dtype::kF32, view.shape});
    }
    auto writer = SafetensorsWriter::create(edited, declarations, {});
    REQUIRE(writer.ok());
    for (const auto& declaration : declarations) {
      std::vector<float> values(tensors->find(declaration.name)->elements());
      tensors->find(declaration.name)->read(0, values);
      edit(declaration.name, values);
      REQUIRE((*writer)->write(std::as_bytes(std::span(values))).ok());
    }
    REQUIRE((*writer)->finish().ok());
  }
  std::filesystem::rename(edited, file);
}

}  // namespace infemeral
