// libcuda.so.1 and libnccl.so.2, opened at run time: neither headers nor libraries of CUDA are needed to build.
//
// The declarations follow cuda.h (driver API 11 to 13) and nccl.h (2.19 to 2.32); tests compare them with the nccl.h of
// the NCCL package. ncclConfig_t may be longer than an older library knows: NCCL reads no more than its own size of it.
#pragma once
#include <climits>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace adf {

using CuStream = void*;
using CuEvent = void*;
using CuContext = void*;
using NcclComm = void*;
using NcclWindow = void*;

constexpr int kCuSuccess = 0;
constexpr int kCuNotReady = 600;
// What an enquiry answers while its event or another thread's stream is captured: nothing is known, nothing is broken.
constexpr int kCuFirstCaptureError = 900;
constexpr int kCuLastCaptureError = 908;
constexpr int kCuCaptureRelaxed = 2;
constexpr unsigned kCuStreamNonBlocking = 1;
constexpr unsigned kCuEventDisableTiming = 2;

constexpr int kNcclSuccess = 0;
constexpr int kNcclInt8 = 0;
constexpr int kNcclUndefined = INT_MIN;
constexpr unsigned kNcclMagic = 0xcafebeef;
constexpr int kNcclOldest = 21900;
// A policy for CTAs is a field of ncclConfig_t since 2.27; older libraries ignore it.
constexpr int kNcclCtaPolicySince = 22700;
constexpr int kNcclPutsSince = 22902;
constexpr int kNcclWindowCollSymmetric = 1;
constexpr size_t kNcclWindowAlignment = 4096;

struct NcclUniqueId {
  char internal[128];
};

// ncclWaitSignalDesc_t: so many more signals of a peer.
struct NcclWaitSignalDesc {
  int opCnt, peer, sigIdx, ctx;
};

// ncclConfig_t, in the order of nccl.h.
// clang-format off
#define ADF_NCCL_CONFIG_FIELDS(X) \
  X(size) X(magic) X(version) X(blocking) X(cgaClusterSize) X(minCTAs) X(maxCTAs) X(netName) X(splitShare) \
  X(trafficClass) X(commName) X(collnetEnable) X(CTAPolicy) X(shrinkShare) X(nvlsCTAs) X(nChannelsPerNetPeer) \
  X(nvlinkCentricSched) X(graphUsageMode) X(numRmaCtx) X(maxP2pPeers) X(graphStreamOrdering) \
  X(launchOrderImplicit) X(numRmaSig) X(rmaEagerInit) X(hostCftMode) X(nvlsHostMode)
// clang-format on

struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  unsigned magic = kNcclMagic;
  unsigned version = 23203;
  int blocking = kNcclUndefined;
  int cgaClusterSize = kNcclUndefined;
  int minCTAs = kNcclUndefined;
  int maxCTAs = kNcclUndefined;
  const char* netName = nullptr;
  int splitShare = kNcclUndefined;
  int trafficClass = kNcclUndefined;
  const char* commName = nullptr;
  int collnetEnable = kNcclUndefined;
  int CTAPolicy = kNcclUndefined;
  int shrinkShare = kNcclUndefined;
  int nvlsCTAs = kNcclUndefined;
  int nChannelsPerNetPeer = kNcclUndefined;
  int nvlinkCentricSched = kNcclUndefined;
  int graphUsageMode = kNcclUndefined;
  int numRmaCtx = kNcclUndefined;
  int maxP2pPeers = kNcclUndefined;
  int graphStreamOrdering = kNcclUndefined;
  int launchOrderImplicit = kNcclUndefined;
  int numRmaSig = kNcclUndefined;
  int rmaEagerInit = kNcclUndefined;
  int hostCftMode = kNcclUndefined;
  int nvlsHostMode = kNcclUndefined;
};

#define ADF_DRIVER_FUNCTIONS(X)                                          \
  X(cuInit, int, (unsigned))                                             \
  X(cuCtxGetCurrent, int, (CuContext*))                                  \
  X(cuCtxSetCurrent, int, (CuContext))                                   \
  X(cuCtxGetStreamPriorityRange, int, (int*, int*))                      \
  X(cuStreamCreateWithPriority, int, (CuStream*, unsigned, int))         \
  X(cuStreamDestroy_v2, int, (CuStream))                                 \
  X(cuStreamWaitEvent, int, (CuStream, CuEvent, unsigned))               \
  X(cuStreamQuery, int, (CuStream))                                      \
  X(cuMemcpyDtoDAsync_v2, int, (uintptr_t, uintptr_t, size_t, CuStream)) \
  X(cuEventCreate, int, (CuEvent*, unsigned))                            \
  X(cuEventRecord, int, (CuEvent, CuStream))                             \
  X(cuEventQuery, int, (CuEvent))                                        \
  X(cuEventDestroy_v2, int, (CuEvent))                                   \
  X(cuThreadExchangeStreamCaptureMode, int, (int*))                      \
  X(cuGetErrorString, int, (int, const char**))

#define ADF_NCCL_FUNCTIONS(X)                                                      \
  X(ncclGetVersion, int, (int*))                                                   \
  X(ncclGetUniqueId, int, (NcclUniqueId*))                                         \
  X(ncclCommInitRankConfig, int, (NcclComm*, int, NcclUniqueId, int, NcclConfig*)) \
  X(ncclCommGetAsyncError, int, (NcclComm, int*))                                  \
  X(ncclCommAbort, int, (NcclComm))                                                \
  X(ncclCommDestroy, int, (NcclComm))                                              \
  X(ncclGroupStart, int, ())                                                       \
  X(ncclGroupEnd, int, ())                                                         \
  X(ncclSend, int, (const void*, size_t, int, int, NcclComm, CuStream))            \
  X(ncclRecv, int, (void*, size_t, int, int, NcclComm, CuStream))                  \
  X(ncclGetErrorString, const char*, (int))                                        \
  X(ncclGetLastError, const char*, (NcclComm))

// Present since kNcclPutsSince; without them there is no NcclPutsTransport.
#define ADF_NCCL_PUTS_FUNCTIONS(X)                                                                                   \
  X(ncclMemAlloc, int, (void**, size_t))                                                                             \
  X(ncclMemFree, int, (void*))                                                                                       \
  X(ncclCommWindowRegister, int, (NcclComm, void*, size_t, NcclWindow*, int))                                        \
  X(ncclCommWindowDeregister, int, (NcclComm, NcclWindow))                                                           \
  X(ncclPutSignal, int, (const void*, size_t, int, int, NcclWindow, size_t, int, int, unsigned, NcclComm, CuStream)) \
  X(ncclSignal, int, (int, int, int, unsigned, NcclComm, CuStream))                                                  \
  X(ncclWaitSignal, int, (int, NcclWaitSignalDesc*, NcclComm, CuStream))

// The two function tables. Shared by the transports that use them; nothing here is global.
class Libraries {
 public:
  // A path, or an empty string: the copy that the process has loaded already, else the one in `nccl_package` (a path,
  // if not empty), else the system's.
  Libraries(const std::string& driver, const std::string& nccl, const std::string& nccl_package);

  // Raises ExchangeError with the loader's reasons where there is no driver; NCCL alone answers without one.
  void require_driver() const;

  // Why this NCCL has no one-sided puts; empty where it has.
  const std::string& puts_missing() const { return puts_missing_; }

#define ADF_MEMBER(name, result, arguments) result(*name) arguments = nullptr;
  ADF_DRIVER_FUNCTIONS(ADF_MEMBER)
  ADF_NCCL_FUNCTIONS(ADF_MEMBER)
  ADF_NCCL_PUTS_FUNCTIONS(ADF_MEMBER)
#undef ADF_MEMBER

  std::string driver_path, nccl_path;
  int nccl_version = 0;

 private:
  std::string driver_error_, puts_missing_;
};

}  // namespace adf
