// The programs' own epoll_wait(): that it waits as the C library's does, and does not sleep when it
// was asked not to.
#include "tools/network_wait.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cerrno>
#include <ctime>
#include <thread>

namespace infemeral {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// An eventfd that is watched.
class Watched {
 public:
  Watched() {
    epoll_event wanted{};
    wanted.events = EPOLLIN;
    wanted.data.u64 = 42;
    REQUIRE(::epoll_ctl(epoll_, EPOLL_CTL_ADD, event_, &wanted) == 0);
  }
  ~Watched() {
    ::close(event_);
    ::close(epoll_);
  }

  void happen() const { (void)::eventfd_write(event_, 1); }
  void forget() const {
    eventfd_t value = 0;
    (void)::eventfd_read(event_, &value);
  }

  struct Wait {
    int n;
    std::uint64_t data;
    Clock::duration took;
    milliseconds processor;  // time that the thread had one
  };
  Wait wait(int timeout_ms) const {
    epoll_event events[2] = {};
    const Clock::time_point begin = Clock::now();
    const milliseconds busy = processor_time();
    const int n = ::epoll_wait(epoll_, events, 2, timeout_ms);
    return {n, events[0].data.u64, Clock::now() - begin, processor_time() - busy};
  }

 private:
  static milliseconds processor_time() {
    timespec t{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return std::chrono::duration_cast<milliseconds>(std::chrono::seconds(t.tv_sec) +
                                                    std::chrono::nanoseconds(t.tv_nsec));
  }

  const int epoll_ = ::epoll_create1(EPOLL_CLOEXEC);
  const int event_ = ::eventfd(0, EFD_CLOEXEC);
};

}  // namespace

TEST_CASE("The wait for the network ends as the C library's", "[network_wait]") {
  const Watched watched;
  // Asleep, awake for all of the wait, and for its beginning.
  const milliseconds awake_for = GENERATE(milliseconds(-1), milliseconds(10000), milliseconds(5));
  CAPTURE(awake_for.count());
  stay_awake_until(Clock::now() + awake_for);

  CHECK(watched.wait(0).n == 0);
  const Watched::Wait in_vain = watched.wait(30);
  CHECK(in_vain.n == 0);
  CHECK(in_vain.took >= milliseconds(29));

  for (int timeout_ms : {-1, 60000}) {
    stay_awake_until(Clock::now() + awake_for);
    const std::jthread later([&] {
      std::this_thread::sleep_for(milliseconds(20));
      watched.happen();
    });
    const Watched::Wait came = watched.wait(timeout_ms);
    CHECK(came.n == 1);
    CHECK(came.data == 42);
    CHECK(came.took < milliseconds(30000));
    CHECK(watched.wait(timeout_ms).n == 1);  // level-triggered: it is still there
    CHECK(watched.wait(0).n == 1);
    watched.forget();
  }
  errno = 0;
  epoll_event event{};
  CHECK(::epoll_wait(-1, &event, 1, 1000) == -1);
  CHECK(errno == EBADF);
  stay_awake_until(Clock::time_point::min());
}

TEST_CASE("Who stays awake keeps a processor busy, who sleeps does not", "[network_wait]") {
  const Watched watched;
  const Watched::Wait asleep = watched.wait(200);
  CHECK(asleep.processor < milliseconds(20));
  stay_awake_until(Clock::now() + milliseconds(10000));
  const Watched::Wait awake = watched.wait(200);
  CHECK(awake.processor > milliseconds(20));
  stay_awake_until(Clock::time_point::min());
}

}  // namespace infemeral
