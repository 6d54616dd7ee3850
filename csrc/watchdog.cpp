#include "watchdog.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <system_error>

namespace adf {
namespace {

constexpr int kPeriodMs = 200;

// When a process started, in ticks since the boot; 0 if there is none, or it has ended and is not yet reaped (state Z);
// 1 where the system does not tell.
unsigned long long start_of(pid_t pid) {
  char path[64], line[1024];
  snprintf(path, sizeof path, "/proc/%d/stat", static_cast<int>(pid));
  FILE* file = fopen(path, "r");
  if (file == nullptr) return errno == ENOENT || errno == ESRCH ? 0 : 1;
  const size_t length = fread(line, 1, sizeof line - 1, file);
  fclose(file);
  line[length] = '\0';
  // The name may hold anything; behind it come the state and 18 numbers, then the time.
  const char* name_end = strrchr(line, ')');
  char state = 'Z';
  unsigned long long started = 0;
  const char* format = " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu";
  if (length == 0) return 0;
  if (name_end == nullptr || sscanf(name_end + 1, format, &state, &started) != 2) return 1;
  return state == 'Z' || state == 'X' ? 0 : started;
}

}  // namespace

Process::Process(pid_t pid, bool use_pidfd) : pid_(pid) {
  if (pid <= 0) return;
  if (use_pidfd) pidfd_ = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  if (pidfd_ < 0) started_ = start_of(pid);
}

Process::Process(Process&& other) noexcept : pid_(other.pid_), pidfd_(other.pidfd_), started_(other.started_) {
  other.pidfd_ = -1;
}

Process::~Process() {
  if (pidfd_ >= 0) ::close(pidfd_);
}

bool Process::ended() const {
  if (pid_ <= 0) return false;
  if (pidfd_ < 0) return started_ == 0 || start_of(pid_) != started_;
  pollfd polled{pidfd_, POLLIN, 0};
  return poll(&polled, 1, 0) > 0;
}

Peers::Peers(const std::vector<pid_t>& pids, bool use_pidfd) : ended_(pids.size(), false) {
  for (pid_t pid : pids) processes_.emplace_back(pid, use_pidfd);
}

std::vector<int> Peers::wait(int wake_fd, int milliseconds) {
  std::vector<pollfd> polled{{wake_fd, POLLIN, 0}};
  for (size_t i = 0; i < processes_.size(); ++i) {
    polled.push_back({ended_[i] ? -1 : processes_[i].pidfd(), POLLIN, 0});
  }
  poll(polled.data(), polled.size(), milliseconds);
  std::vector<int> ranks;
  for (size_t i = 0; i < processes_.size(); ++i) {
    if (!ended_[i]) ended_[i] = processes_[i].ended();
    if (ended_[i]) ranks.push_back(static_cast<int>(i));
  }
  return ranks;
}

Watchdog::Watchdog(std::vector<pid_t> pids, bool use_pidfd, std::function<void()> begin,
                   std::function<void(const std::vector<int>&)> look)
    : peers_(pids, use_pidfd), begin_(std::move(begin)), look_(std::move(look)), wake_fd_(eventfd(0, EFD_CLOEXEC)) {
  if (wake_fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  thread_ = std::thread([this] {
    begin_();
    pollfd woken{wake_fd_, POLLIN, 0};
    while (poll(&woken, 1, 0) == 0) {
      const std::vector<int> ended = peers_.wait(wake_fd_, kPeriodMs);
      look_(ended);
    }
  });
}

Watchdog::~Watchdog() {
  stop();
  ::close(wake_fd_);
}

void Watchdog::stop() {
  if (!thread_.joinable()) return;
  eventfd_t one = 1;
  eventfd_write(wake_fd_, one);
  thread_.join();
}

}  // namespace adf
