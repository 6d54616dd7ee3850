// CUDA tensors: one communicator and one stream of its own, high in priority, on which every group runs in turn.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>

#include "dynlib.hpp"
#include "transport.hpp"

namespace adf {

struct NcclOptions {
  double timeout_s = 30;
  int max_ctas = kNcclUndefined;
  int cta_policy = kNcclUndefined;
};

class NcclTransport : public Transport {
 public:
  // Begins to connect and returns at once; the rank's CUDA context must be current. Then call `ready` until it is true.
  NcclTransport(std::shared_ptr<const Libraries> libraries, const std::string& unique_id, int rank, int size,
                const NcclOptions& options);
  ~NcclTransport() override;

  // Whether all ranks are connected. Raises ExchangeError if that failed or took longer than `timeout_s`.
  bool ready();

  static std::string unique_id(const Libraries& libraries);
  const Libraries& libraries() const { return *libraries_; }

  bool on_host() const override { return false; }
  void attach(Group* group) override;
  void detach(Group* group) override;
  void submit(const Group& group, uint64_t epoch, Stream stream) override;
  bool order(const Group& group, uint64_t epoch, Stream stream, Clock::time_point deadline) override;
  bool finish(const Group& group, uint64_t epoch, Clock::time_point deadline) override;
  State state(const Group& group, uint64_t epoch) override;
  std::vector<int> missing(const Group& group, uint64_t epoch) override;
  void inspect() override;
  void abort(const std::string& reason) noexcept override;
  void close() override;

 protected:
  // Puts the messages of an epoch on this lane's stream; whom it waits for, and who waits for it, is seen to already.
  virtual void move(const Group& group, uint64_t epoch);
  // Ends a communicator that nobody can wait for.
  virtual void end(NcclComm comm) noexcept { libraries_->ncclCommAbort(comm); }

  // Calls of NCCL. True: the last one goes on in the background, and later ones must not come before it is done.
  template <class Calls>
  bool start(const char* what, const Calls& calls) {
    std::lock_guard<std::mutex> lock(comm_mutex_);
    if (gone_) throw ExchangeError("the NCCL communicator is closed");
    const int result = calls(comm_);
    nccl(result, what);
    return result == kNcclInProgress;
  }
  template <class Calls>
  void issue(const char* what, const Calls& calls) {
    if (start(what, calls)) settle(what);
  }
  // As one group, the calls of `calls(note)`; `note` takes the result of each.
  template <class Calls>
  void issue_group(const Calls& calls) {
    issue("ncclGroupEnd", [&](NcclComm comm) {
      nccl(libraries_->ncclGroupStart(), "ncclGroupStart");
      int result = kNcclSuccess;
      calls(comm, [&result](int one) {
        if (one != kNcclSuccess && one != kNcclInProgress) result = one;
      });
      const int ended = libraries_->ncclGroupEnd();
      return result == kNcclSuccess ? ended : result;
    });
  }
  void settle(const char* what);
  int async_error();
  bool gone() const { return gone_; }
  void cuda(int result, const char* what) const;
  void nccl(int result, const char* what);
  CuStream stream() const { return stream_; }
  CuContext context() const { return context_; }

  const std::shared_ptr<const Libraries> libraries_;

 private:
  struct Mark {
    CuEvent ready = nullptr;  // recorded on the caller's stream by the post
    CuEvent done = nullptr;   // recorded on this lane's stream behind the group
  };

  void start_stream();
  void free_driver_objects();
  NcclConfig config() const;
  bool done(CuEvent event) const;
  const Mark& mark(const Group& group, uint64_t epoch) const;

  NcclOptions options_;
  Clock::time_point began_ = Clock::now();
  NcclComm comm_ = nullptr;
  // Guards comm_ against being aborted, and so freed, while another thread is inside a call with it.
  std::mutex comm_mutex_;
  std::atomic<bool> gone_{false};
  CuContext context_ = nullptr;
  CuStream stream_ = nullptr;
  std::vector<Mark> marks_;
  std::vector<int> free_marks_;
  mutable std::mutex marks_mutex_;
};

}  // namespace adf
