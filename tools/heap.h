// glibc's heap in a program that serves for weeks: what it keeps is to follow what is in use. This
// is for programs: a library leaves the heap to the program that it is part of.
#pragma once

#include <thread>

#include "net/body_server.h"

namespace infemeral {

// From now on every block of 128 KiB or more is a mapping of its own, which goes back to the system
// when it is freed. Call it before there are large blocks.
void fix_heap_thresholds();

// While it lives: when connections or sessions have come or gone and the server is at rest, the
// pages that are free inside the heap go back to the system. The server is borrowed.
class HeapTrimmer {
 public:
  explicit HeapTrimmer(const BodyServer& server);

 private:
  std::jthread thread_;
};

}  // namespace infemeral
