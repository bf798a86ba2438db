// The edge of the room: no exception leaves it.
#pragma once

#include <exception>
#include <new>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/text.h"

namespace infemeral {

// body(), which returns an absl::StatusOr<T> or something that becomes one; ResourceExhausted when
// it runs out of memory, Internal for any other exception.
template <typename T, typename Body>
absl::StatusOr<T> guarded_or(Body&& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("out of memory");
  } catch (const std::exception& e) {
    return absl::InternalError(cat("unexpected error: ", e.what()));
  }
}

// The same for a body that returns an absl::Status.
template <typename Body>
absl::Status guarded(Body&& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("out of memory");
  } catch (const std::exception& e) {
    return absl::InternalError(cat("unexpected error: ", e.what()));
  }
}

}  // namespace infemeral
