// CUDA tensors: one communicator and one stream of its own, high in priority, on which every group runs in turn.
//
// The communicator blocks: of one that does not, every group is launched by a thread of NCCL's (since 2.23.4), and the
// caller has to enquire until that is over. What waits for other ranks, connecting and registering windows, is done
// aside: posts find the connections there and put their group on the stream, nothing else.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <set>

#include "aside.hpp"
#include "dynlib.hpp"
#include "transport.hpp"

namespace adf {

struct NcclOptions {
  double timeout_s = 30;
  int max_ctas = kNcclUndefined;
  int cta_policy = kNcclUndefined;
};

// Raises ExchangeError unless a call of NCCL has succeeded.
void check_nccl(const Libraries& libraries, int result, const char* what);

// A communicator, as long as anybody is inside a call with it.
struct Communicator {
  // Held during each call, so that it is not aborted, and so freed, meanwhile.
  std::mutex mutex;
  NcclComm handle = nullptr;
  std::atomic<bool> gone{false};
  // A call aside may wait for ever. Once the communicator is gone whoever comes back from one ends it.
  std::atomic<bool> aside{false};
};

// Makes a context the current one of this thread until the end of a block.
class Entered {
 public:
  Entered(const Libraries& libraries, CuContext context) : libraries_(libraries) {
    libraries_.cuCtxGetCurrent(&before_);
    changed_ = before_ != context;
    if (changed_) libraries_.cuCtxSetCurrent(context);
  }
  ~Entered() {
    if (changed_) libraries_.cuCtxSetCurrent(before_);
  }
  Entered(const Entered&) = delete;
  Entered& operator=(const Entered&) = delete;

 private:
  const Libraries& libraries_;
  CuContext before_ = nullptr;
  bool changed_ = false;
};

class NcclTransport : public Transport {
 public:
  // Begins to connect and returns at once; the rank's CUDA context must be current, later it need not. Then call
  // `ready` until it is true.
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
  void open(const std::vector<const Group*>& groups, const std::vector<std::vector<size_t>>& windows) override;
  bool opened(Clock::time_point deadline) override;
  void submit(const Group& group, uint64_t epoch, Stream stream) override;
  bool order(const Group& group, uint64_t epoch, Stream stream, Clock::time_point deadline) override;
  bool finish(const Group& group, uint64_t epoch, Clock::time_point deadline) override;
  State state(const Group& group, uint64_t epoch) override;
  std::vector<int> missing(const Group& group, uint64_t epoch) override;
  void watched() override;
  void inspect() override;
  void abort(const std::string& reason) override;
  void close() override;

 protected:
  // Puts the messages of an epoch on this lane's stream; whom it waits for, and who waits for it, is seen to already.
  virtual void move(const Group& group, uint64_t epoch);
  // Ends a communicator that nobody can wait for.
  virtual void end(NcclComm comm) { libraries_->ncclCommAbort(comm); }

  // Calls of NCCL that wait for no other rank, once all that does is over: see `opened`.
  template <class Calls>
  void issue(const char* what, const Calls& calls) {
    std::lock_guard<std::mutex> lock(comm_->mutex);
    if (gone()) throw ExchangeError("the NCCL communicator is closed");
    check_nccl(*libraries_, calls(comm_->handle), what);
  }
  // As one group, the calls of `calls(note)`; `note` takes the result of each.
  template <class Calls>
  void issue_group(const Calls& calls) {
    issue("ncclGroupEnd", [&](NcclComm comm) {
      check_nccl(*libraries_, libraries_->ncclGroupStart(), "ncclGroupStart");
      int result = kNcclSuccess;
      calls(comm, [&result](int one) {
        if (one != kNcclSuccess) result = one;
      });
      const int ended = libraries_->ncclGroupEnd();
      return result == kNcclSuccess ? ended : result;
    });
  }
  // Begins a call that waits for other ranks; `call(communicator)` gives NCCL's result and owns what it touches.
  void begin_aside(const char* what, std::function<int(NcclComm*)> call);
  bool settled() const { return aside_.idle(); }
  // Waits a second for the lane to run dry.
  bool run_dry() const;
  bool gone() const { return comm_->gone; }
  void cuda(int result, const char* what) const;
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
  const std::shared_ptr<Communicator> comm_ = std::make_shared<Communicator>();
  CuContext context_ = nullptr;
  CuStream stream_ = nullptr;
  // (peer, whether this rank sends) of the connections that are there or on their way.
  std::set<std::pair<int, bool>> connected_;
  std::vector<Mark> marks_;
  std::vector<int> free_marks_;
  mutable std::mutex marks_mutex_;
  // Ends first: until then its thread may be at work with the others.
  Aside aside_;
};

}  // namespace adf
