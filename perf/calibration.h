// Two fixed loops that tell how fast this machine is at this moment, so that a report of a slow or
// a busy machine can be compared with another one. They run between the samples of a case and see
// the same neighbours.
//
// Their names are part of a report: whoever changes a loop renames it, and the gate then refuses to
// compare across the change.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <string_view>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace infemeral {

enum class CalibrationLoop { kCompute, kHandoff };

std::string_view calibration_name(CalibrationLoop loop);  // "compute-2"

// One thread at a time.
class Calibrator {
 public:
  explicit Calibrator(int threads);  // as the backends': 0 is one for each physical core
  ~Calibrator();
  Calibrator(const Calibrator&) = delete;
  Calibrator& operator=(const Calibrator&) = delete;

  // Milliseconds of one pass.
  //   kCompute   all threads multiply and add 16 MiB of floats each, as a product of one row does
  //   kHandoff   two threads wake each other 100 times, as the two ends of a channel do
  double run(CalibrationLoop loop);

 private:
  double compute_ms();
  double handoff_ms();

  ThreadPool pool_;
  std::vector<float> values_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int turn_ = 0;  // 1: the partner's
  bool ending_ = false;
  std::thread partner_;
};

// How fast `threads` (0: as above) read `bytes` of memory, the fastest of several passes: no token
// is faster than its weights are read.
double read_bytes_per_second(int threads, std::size_t bytes);

}  // namespace infemeral
