#include "dynlib.hpp"

#include <dlfcn.h>
#include <link.h>

#include "errors.hpp"

namespace adf {
namespace {

// Opened libraries stay open: others in the process use them too, and CUDA cannot be unloaded safely.
void* open_library(const char* soname, const std::string& path, const std::string& package, std::string* where,
                   std::string* error) {
  void* handle = nullptr;
  if (path.empty()) {
    handle = dlopen(soname, RTLD_NOW | RTLD_NOLOAD);
    if (handle == nullptr && !package.empty()) handle = dlopen(package.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) handle = dlopen(soname, RTLD_NOW | RTLD_LOCAL);
  } else {
    handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  if (handle == nullptr) {
    *error = dlerror();
    return nullptr;
  }
  link_map* map = nullptr;
  if (dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0) *where = map->l_name;
  return handle;
}

template <class Function>
bool bind(void* handle, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  return *function != nullptr;
}

}  // namespace

Libraries::Libraries(const std::string& driver, const std::string& nccl, const std::string& nccl_package) {
  std::string error;
  void* handle = open_library("libnccl.so.2", nccl, nccl_package, &nccl_path, &error);
  if (handle == nullptr) throw ExchangeError("libnccl.so.2 cannot be opened: " + error);
#define ADF_BIND(name, result, arguments) \
  if (!bind(handle, #name, &name)) throw ExchangeError(nccl_path + " has no " #name "; NCCL 2.19 or later is needed");
  ADF_NCCL_FUNCTIONS(ADF_BIND)
#undef ADF_BIND
  if (ncclGetVersion(&nccl_version) != kNcclSuccess || nccl_version < kNcclOldest) {
    throw ExchangeError("NCCL 2.19 or later is needed: got version " + std::to_string(nccl_version) + " in " +
                        nccl_path);
  }
  if (nccl_version < kNcclPutsSince) {
    puts_missing_ = "NCCL 2.29.2 or later is needed for one-sided puts: got version " + std::to_string(nccl_version) +
                    " in " + nccl_path;
  }
#define ADF_BIND(name, result, arguments) \
  if (!bind(handle, #name, &name) && puts_missing_.empty()) puts_missing_ = nccl_path + " has no " #name;
  ADF_NCCL_PUTS_FUNCTIONS(ADF_BIND)
#undef ADF_BIND
  handle = open_library("libcuda.so.1", driver, "", &driver_path, &driver_error_);
  if (handle == nullptr) return;
#define ADF_BIND(name, result, arguments) \
  if (!bind(handle, #name, &name)) driver_error_ = driver_path + " has no " #name;
  ADF_DRIVER_FUNCTIONS(ADF_BIND)
#undef ADF_BIND
}

void Libraries::require_driver() const {
  if (!driver_error_.empty()) throw ExchangeError("libcuda.so.1 cannot be used: " + driver_error_);
}

}  // namespace adf
