// The ordering rules of the exchange: one number for each edge that keeps two accesses to a buffer apart.
//
// C is the compute stream, M the communication stream, e the epoch of a slot (its e-th post), d its depth; a slot sends
// from S[e mod d] and receives into R[e mod d]. Every edge is drawn in exactly one place, inside ADF_EDGE. A build with
// ADF_MUTANTS can leave out one of them at run time, so that tests can prove that each is needed and that its absence
// is noticed; a release build has no such switch.
#pragma once
#include <array>

namespace adf {

enum class Edge {
  SendAfterProducer,
  RecvAfterReaders,
  DoneRecorded,
  ReadAfterRecv,
  WriteAfterSend,
  HostAfterDone,
  PutAfterCopyOut,
  CopyAfterPut,
  Count,
};

// `transports`: "nccl" stands for both of its ways, "nccl-puts" for the one-sided one alone.
struct EdgeRow {
  Edge edge;
  const char* name;
  const char* hazard;
  const char* transports;
};

constexpr int kEdgeCount = static_cast<int>(Edge::Count);

constexpr std::array<EdgeRow, kEdgeCount> kEdges{{
    {Edge::SendAfterProducer, "SendAfterProducer", "RAW: M sends S[e] after C wrote it", "nccl"},
    {Edge::RecvAfterReaders, "RecvAfterReaders", "WAR: M receives into R[e] after C read R[e-d]", "nccl"},
    {Edge::DoneRecorded, "DoneRecorded", "RAW and WAR: what waits for epoch e waits for its own transfers", "nccl"},
    {Edge::ReadAfterRecv, "ReadAfterRecv", "RAW: C reads R[e] after M received it", "nccl,shm"},
    {Edge::WriteAfterSend, "WriteAfterSend", "WAR: C writes S[e] after M sent S[e-d]", "nccl,shm"},
    {Edge::HostAfterDone, "HostAfterDone", "WAR: the host frees or reuses buffers after M is done with them",
     "nccl,shm"},
    {Edge::PutAfterCopyOut, "PutAfterCopyOut", "WAR: M puts into a peer's place after the peer copied out of it",
     "nccl-puts"},
    {Edge::CopyAfterPut, "CopyAfterPut", "RAW: M copies out of a place after the peer's put", "nccl-puts"},
}};

constexpr bool edges_in_order() {
  for (int i = 0; i < kEdgeCount; ++i) {
    if (static_cast<int>(kEdges[i].edge) != i) return false;
  }
  return true;
}
static_assert(edges_in_order(), "kEdges must list every edge once, in the order of Edge");

#ifdef ADF_MUTANTS
bool edge_dropped(Edge edge);
void drop_edge(int number);  // -1: none
#define ADF_EDGE(edge, ...)                             \
  do {                                                  \
    if (!::adf::edge_dropped(::adf::edge)) __VA_ARGS__; \
  } while (false)
#else
#define ADF_EDGE(edge, ...) \
  do {                      \
    __VA_ARGS__;            \
  } while (false)
#endif

}  // namespace adf
