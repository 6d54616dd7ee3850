// Which test case shows that an edge of the exchange is needed. An edge without a case does not compile.
#include <array>
#include <string>

#include "../../csrc/edges.hpp"
#include "exports.hpp"

namespace {

struct Mutant {
  adf::Edge edge;
  const char* test_case;
};

// Functions of tests/exchange/test_mutants.py.
constexpr std::array<Mutant, adf::kEdgeCount> kMutants{{
    {adf::Edge::SendAfterProducer, "send_after_producer"},
    {adf::Edge::RecvAfterReaders, "recv_after_readers"},
    {adf::Edge::DoneRecorded, "done_recorded"},
    {adf::Edge::ReadAfterRecv, "read_after_recv"},
    {adf::Edge::WriteAfterSend, "write_after_send"},
    {adf::Edge::HostAfterDone, "host_after_done"},
    {adf::Edge::PutAfterCopyOut, "put_after_copy_out"},
    {adf::Edge::CopyAfterPut, "copy_after_put"},
}};

constexpr bool every_edge_has_a_case() {
  for (int i = 0; i < adf::kEdgeCount; i++)
    if (static_cast<int>(kMutants[i].edge) != i || kMutants[i].test_case == nullptr) return false;
  return true;
}
static_assert(every_edge_has_a_case(), "kMutants must name a test case for every Edge, in the order of Edge");

}  // namespace

// The case of an edge by its number; null after the last.
FAKE_API const char* fake_mutant(int edge) {
  return edge < 0 || edge >= adf::kEdgeCount ? nullptr : kMutants[edge].test_case;
}
