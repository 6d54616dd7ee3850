// The module `_C`. Nothing else in csrc/ knows of Python; whatever may block or calls a driver runs without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "channel.hpp"
#include "edges.hpp"
#include "nccl_puts.hpp"
#include "shm_transport.hpp"

namespace py = pybind11;
using namespace adf;
using Unlocked = py::call_guard<py::gil_scoped_release>;

namespace {

// (peer, one address for each of the depth, bytes), as Python lists them.
using Listed = std::tuple<int, std::vector<uintptr_t>, size_t>;

std::vector<Message> messages(const std::vector<Listed>& sends, const std::vector<Listed>& recvs) {
  std::vector<Message> all;
  auto append = [&all](const std::vector<Listed>& listed, bool send) {
    for (const auto& [peer, addresses, bytes] : listed) {
      Message x{peer, send, bytes, {}};
      for (uintptr_t address : addresses) x.buffers.push_back(reinterpret_cast<char*>(address));
      all.push_back(std::move(x));
    }
  };
  append(sends, true);
  append(recvs, false);
  return all;
}

// Messages quote libraries and systems, whose texts need not be UTF-8.
py::str text(const std::string& bytes) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "backslashreplace"));
}

// To end a channel joins a thread and may wait for NCCL.
struct EndsUnlocked {
  void operator()(Channel* channel) const {
    py::gil_scoped_release unlocked;
    delete channel;
  }
};

py::dict statistics(const Statistics& s) {
  py::dict by_slot;
  for (const auto& [name, us] : s.wait_us_by_slot) by_slot[text(name)] = us;
  using namespace py::literals;
  return py::dict("posts"_a = s.posts, "sent_bytes"_a = s.sent_bytes, "post_us"_a = s.post_us, "wait_us"_a = s.wait_us,
                  "waits_elided"_a = s.waits_elided, "wait_us_by_slot"_a = by_slot);
}

py::list edges() {
  using namespace py::literals;
  py::list rows;
  for (const EdgeRow& row : kEdges) {
    rows.append(py::dict("number"_a = static_cast<int>(row.edge), "name"_a = row.name, "hazard"_a = row.hazard,
                         "transports"_a = row.transports));
  }
  return rows;
}

py::dict nccl_info(const NcclTransport& t) {
  using namespace py::literals;
  const Libraries& lib = t.libraries();
  return py::dict("version"_a = lib.nccl_version, "path"_a = lib.nccl_path, "driver"_a = lib.driver_path,
                  "cta_policy_known"_a = lib.nccl_version >= kNcclCtaPolicySince);
}

// Signals are heard while a thread waits without the GIL, and so is what `pause()` raises, if there is one.
std::function<void()> pausing(py::object pause) {
  // Whoever ends a channel may do so without the GIL.
  const std::shared_ptr<py::object> held(new py::object(std::move(pause)), [](py::object* last) {
    py::gil_scoped_acquire locked;
    delete last;
  });
  return [held] {
    py::gil_scoped_acquire locked;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!held->is_none()) (*held)();
  };
}

// What the declarations in dynlib.hpp assume, for tests to compare with the nccl.h of an installed NCCL.
py::dict nccl_abi() {
  using namespace py::literals;
  py::list fields;
#define ADF_FIELD(field) fields.append(py::make_tuple(#field, offsetof(NcclConfig, field), sizeof(NcclConfig::field)));
  ADF_NCCL_CONFIG_FIELDS(ADF_FIELD)
#undef ADF_FIELD
  py::list awaited;
#define ADF_FIELD(field) awaited.append(py::make_tuple(#field, offsetof(NcclWaitSignalDesc, field)))
  ADF_FIELD(opCnt);
  ADF_FIELD(peer);
  ADF_FIELD(sigIdx);
  ADF_FIELD(ctx);
#undef ADF_FIELD
  py::dict functions, puts_functions;
#define ADF_FUNCTION(name, result, arguments) functions[#name] = #arguments;
  ADF_NCCL_FUNCTIONS(ADF_FUNCTION)
#undef ADF_FUNCTION
#define ADF_FUNCTION(name, result, arguments) puts_functions[#name] = #arguments;
  ADF_NCCL_PUTS_FUNCTIONS(ADF_FUNCTION)
#undef ADF_FUNCTION
  return py::dict(
      "config"_a = fields, "config_bytes"_a = sizeof(NcclConfig), "unique_id_bytes"_a = sizeof(NcclUniqueId),
      "magic"_a = kNcclMagic, "undefined"_a = kNcclUndefined, "ncclSuccess"_a = kNcclSuccess, "ncclInt8"_a = kNcclInt8,
      "functions"_a = functions, "puts_functions"_a = puts_functions, "awaited"_a = awaited,
      "awaited_bytes"_a = sizeof(NcclWaitSignalDesc), "puts_since"_a = kNcclPutsSince,
      "NCCL_WIN_COLL_SYMMETRIC"_a = kNcclWindowCollSymmetric, "NCCL_WIN_REQUIRED_ALIGNMENT"_a = kNcclWindowAlignment);
}

void bind_nccl(py::module_& m) {
  py::class_<Libraries, std::shared_ptr<Libraries>>(m, "Libraries", py::module_local())
      .def(py::init<const std::string&, const std::string&, const std::string&>(), py::arg("driver") = "",
           py::arg("nccl") = "", py::arg("nccl_package") = "")
      .def_readonly("driver_path", &Libraries::driver_path)
      .def_readonly("nccl_path", &Libraries::nccl_path)
      .def_readonly("nccl_version", &Libraries::nccl_version)
      .def_property_readonly("puts_missing", &Libraries::puts_missing)
      .def("require_driver", &Libraries::require_driver);
  m.def("nccl_abi", &nccl_abi);
  m.def("unique_id", [](const Libraries& libraries) { return py::bytes(NcclTransport::unique_id(libraries)); });
  py::class_<NcclTransport, Transport, std::shared_ptr<NcclTransport>>(m, "NcclTransport", py::module_local())
      .def(py::init([](std::shared_ptr<Libraries> libraries, const std::string& unique_id, int rank, int size,
                       double timeout_s, int max_ctas, int cta_policy, bool puts) {
             NcclOptions options;
             options.timeout_s = timeout_s;
             if (max_ctas > 0) options.max_ctas = max_ctas;
             if (cta_policy >= 0) options.cta_policy = cta_policy;
             py::gil_scoped_release unlocked;
             std::shared_ptr<NcclTransport> made;
             if (puts) {
               made = std::make_shared<NcclPutsTransport>(std::move(libraries), unique_id, rank, size, options);
             } else {
               made = std::make_shared<NcclTransport>(std::move(libraries), unique_id, rank, size, options);
             }
             return made;
           }),
           py::arg("libraries"), py::arg("unique_id"), py::arg("rank"), py::arg("size"), py::arg("timeout_s") = 30.0,
           py::arg("max_ctas") = 0, py::arg("cta_policy") = -1, py::arg("puts") = false)
      .def("ready", &NcclTransport::ready, Unlocked())
      .def("info", &nccl_info);
}

void bind_shm(py::module_& m) {
  py::class_<ShmTransport, Transport, std::shared_ptr<ShmTransport>>(m, "ShmTransport", py::module_local())
      .def(py::init([](int rank, int size, uint64_t token, size_t ring_bytes, bool futex, bool direct) {
             return std::make_shared<ShmTransport>(rank, size, token, ShmOptions{ring_bytes, futex, direct});
           }),
           py::arg("rank"), py::arg("size"), py::arg("token"), py::arg("ring_bytes") = ShmOptions().ring_bytes,
           py::arg("futex") = true, py::arg("direct") = true)
      .def("address", &ShmTransport::address)
      .def("connect", &ShmTransport::connect, Unlocked(), py::arg("addresses"));
}

void bind_channel(py::module_& m) {
  py::class_<Channel, std::unique_ptr<Channel, EndsUnlocked>>(m, "Channel", py::module_local())
      .def(py::init([](std::shared_ptr<Transport> transport, double timeout_s, std::vector<int> pids, bool pidfd,
                       std::vector<int> ranks, py::object pause) {
             return std::unique_ptr<Channel, EndsUnlocked>(new Channel(
                 std::move(transport), timeout_s, std::move(pids), pidfd, std::move(ranks), pausing(std::move(pause))));
           }),
           py::arg("transport"), py::arg("timeout_s") = 30.0, py::arg("pids") = std::vector<int>(),
           py::arg("pidfd") = true, py::arg("ranks") = std::vector<int>(), py::arg("pause") = py::none())
      .def(
          "add",
          [](Channel& c, const std::string& name, const std::vector<Listed>& sends, const std::vector<Listed>& recvs,
             int depth) {
            auto all = messages(sends, recvs);
            py::gil_scoped_release unlocked;
            return c.add(name, std::move(all), depth);
          },
          py::arg("name"), py::arg("sends"), py::arg("recvs"), py::arg("depth") = 2)
      .def("window", &Channel::window, Unlocked(), py::arg("slots"))
      .def("freeze", &Channel::freeze, Unlocked(), py::arg("phase"), py::arg("slots"),
           py::arg("windows") = std::vector<std::vector<size_t>>())
      .def("release", &Channel::release, Unlocked(), py::arg("phase"))
      .def("acquire", &Channel::acquire, Unlocked(), py::arg("slot"), py::arg("stream") = 0)
      .def("post", &Channel::post, Unlocked(), py::arg("slot"), py::arg("stream") = 0)
      .def("wait", &Channel::wait, Unlocked(), py::arg("slot"), py::arg("stream") = 0, py::arg("lag") = 0)
      .def("drain", &Channel::drain, Unlocked(), py::arg("slots"))
      .def("check", &Channel::check, Unlocked())
      .def("abort", &Channel::abort, Unlocked(), py::arg("reason"))
      .def("report", &Channel::report, Unlocked(), py::arg("reason"))
      .def("leave", &Channel::leave, Unlocked(), py::arg("reason"))
      .def("mark_left", &Channel::mark_left, py::arg("rank"))
      .def("broken",
           [](const Channel& c) -> py::object {
             const auto reason = c.broken();
             return reason ? py::object(text(*reason)) : py::none();
           })
      .def("stats", [](const Channel& c) { return statistics(c.stats()); })
      .def("clear_stats", &Channel::clear_stats)
      .def("history",
           [](Channel& c) {
             py::list rows;
             for (const PostRecord& r : c.history()) {
               rows.append(py::make_tuple(r.phase, r.slot, r.epoch, r.age_s, r.state));
             }
             return rows;
           })
      .def("close", &Channel::close, Unlocked(), py::arg("patience_s") = 0.0);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Slots that travel between ranks while their devices compute.";
  // One class for all failures; `use_error` puts the package's own in its place.
  static PyObject* error = PyErr_NewException("_C.ExchangeError", PyExc_RuntimeError, nullptr);
  m.attr("ExchangeError") = py::handle(error);
  m.def("use_error", [](py::object cls) { error = cls.release().ptr(); });
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const ExchangeError& e) {
      PyErr_SetObject(error, text(e.what()).ptr());
    }
  });
  py::class_<Transport, std::shared_ptr<Transport>>(m, "Transport", py::module_local());
  bind_nccl(m);
  bind_shm(m);
  bind_channel(m);
  m.def("edges", &edges);
#ifdef ADF_MUTANTS
  m.attr("mutants") = true;
  m.def("drop_edge", &drop_edge, py::arg("number"));
#else
  m.attr("mutants") = false;
#endif
}
