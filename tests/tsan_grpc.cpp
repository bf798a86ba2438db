// ThreadSanitizer does not see how Debian's gRPC hands work from thread to thread: absl::Mutex is
// built without it and sleeps in futex calls, and the queues between a call and its callbacks are
// lock-free. These functions stand in front of the libraries' own, by their names there, and tell
// ThreadSanitizer what happens; so the hand-overs inside gRPC order our callbacks as they do in
// truth, and a race of ours between two callbacks is still found.
#include <dlfcn.h>
#include <grpc/grpc.h>
#include <sanitizer/tsan_interface.h>

#include "absl/synchronization/mutex.h"

namespace {

template <typename Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

#define LOCK "_ZN4absl7debian35Mutex4LockEv"
#define TRY_LOCK "_ZN4absl7debian35Mutex7TryLockEv"
#define UNLOCK "_ZN4absl7debian35Mutex6UnlockEv"
#define WAIT "_ZN4absl7debian37CondVar4WaitEPNS0_5MutexE"
#define WAIT_TIMEOUT "_ZN4absl7debian37CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE"
#define WAIT_DEADLINE "_ZN4absl7debian37CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE"

extern "C" {

void shim_lock(absl::Mutex* mutex) asm(LOCK);
bool shim_try_lock(absl::Mutex* mutex) asm(TRY_LOCK);
void shim_unlock(absl::Mutex* mutex) asm(UNLOCK);
void shim_wait(absl::CondVar* condition, absl::Mutex* mutex) asm(WAIT);
bool shim_wait_timeout(absl::CondVar* condition, absl::Mutex* mutex,
                       absl::Duration timeout) asm(WAIT_TIMEOUT);
bool shim_wait_deadline(absl::CondVar* condition, absl::Mutex* mutex,
                        absl::Time deadline) asm(WAIT_DEADLINE);

void shim_lock(absl::Mutex* mutex) {
  static auto* const original = next<void(absl::Mutex*)>(LOCK);
  original(mutex);
  __tsan_acquire(mutex);
}

bool shim_try_lock(absl::Mutex* mutex) {
  static auto* const original = next<bool(absl::Mutex*)>(TRY_LOCK);
  const bool locked = original(mutex);
  if (locked) __tsan_acquire(mutex);
  return locked;
}

void shim_unlock(absl::Mutex* mutex) {
  static auto* const original = next<void(absl::Mutex*)>(UNLOCK);
  __tsan_release(mutex);
  original(mutex);
}

void shim_wait(absl::CondVar* condition, absl::Mutex* mutex) {
  static auto* const original = next<void(absl::CondVar*, absl::Mutex*)>(WAIT);
  __tsan_release(mutex);
  original(condition, mutex);
  __tsan_acquire(mutex);
}

bool shim_wait_timeout(absl::CondVar* condition, absl::Mutex* mutex, absl::Duration timeout) {
  static auto* const original =
      next<bool(absl::CondVar*, absl::Mutex*, absl::Duration)>(WAIT_TIMEOUT);
  __tsan_release(mutex);
  const bool timed_out = original(condition, mutex, timeout);
  __tsan_acquire(mutex);
  return timed_out;
}

bool shim_wait_deadline(absl::CondVar* condition, absl::Mutex* mutex, absl::Time deadline) {
  static auto* const original = next<bool(absl::CondVar*, absl::Mutex*, absl::Time)>(WAIT_DEADLINE);
  __tsan_release(mutex);
  const bool timed_out = original(condition, mutex, deadline);
  __tsan_acquire(mutex);
  return timed_out;
}

// An operation's callback runs after what the thread that began the operation did before. Its last
// step in gRPC before the callback is to give up the operation's hold on the call.
grpc_call_error grpc_call_start_batch(grpc_call* call, const grpc_op* ops, size_t n, void* tag,
                                      void* reserved) {
  static auto* const original =
      next<grpc_call_error(grpc_call*, const grpc_op*, size_t, void*, void*)>(
          "grpc_call_start_batch");
  __tsan_release(call);
  return original(call, ops, n, tag, reserved);
}

void grpc_call_unref(grpc_call* call) {
  static auto* const original = next<void(grpc_call*)>("grpc_call_unref");
  __tsan_acquire(call);  // before: it may be the last hold
  original(call);
}

}  // extern "C"
