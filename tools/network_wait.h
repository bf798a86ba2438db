// How this process waits for the network. gRPC's threads sleep in epoll_wait(), and have no option
// for anything else; one that sleeps is awake up to 0.1 ms late, and what it does then runs on a
// processor that has slowed down. A program that is linked with this file has an epoll_wait() of
// its own, which gRPC's library then calls instead of the C library's: the same, but that it looks
// by itself instead of sleeping while somebody has asked for it.
#pragma once

#include <chrono>

namespace infemeral {

// Until then whoever waits for the network keeps a processor busy with it. May be called from any
// thread; the last call counts. Without effect in builds with sanitizers, which have an
// epoll_wait() of their own.
void stay_awake_until(std::chrono::steady_clock::time_point when);
std::chrono::steady_clock::time_point awake_until();  // what was asked last

}  // namespace infemeral
