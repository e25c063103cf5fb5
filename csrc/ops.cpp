// Defines the ops of schemas.h and registers the CPU kernels. Importing the module runs this.
//
// Nothing is bound by pybind11, which has no limited API: one binary serves every Python from 3.10
// on (abi3). What is no tensor op is Python (packing plans, repack.py) or an op (build_info).
#include "fold_pack_cpu.h"
#include "multi_tensor.h"
#include "open_linear.h"
#include "open_sets.h"
#include "passes.h"

#include <Python.h>

#define GATEPACK_TEXT(...) #__VA_ARGS__
#define GATEPACK_EXPAND(...) GATEPACK_TEXT(__VA_ARGS__)

namespace gatepack {
namespace {

std::string build_info() {
  std::ostringstream json;
#if defined(__clang__)
  json << R"({"compiler": "clang )" << __clang_version__;
#elif defined(__GNUC__)
  json << R"({"compiler": "gcc )" << __VERSION__;
#else
  json << R"({"compiler": "unknown)";
#endif
  json << R"(", "cxx": )" << __cplusplus << R"(, "flags": ")" << GATEPACK_EXPAND(GATEPACK_FLAGS)
       << R"(", "simd": ")" << simd_level() << R"(", "threads": "torch", "num_threads": )"
       << torch::stable::get_num_threads() << R"(, "cuda_archs": )";
#ifdef GATEPACK_CUDA_ARCHS
  json << '"' << GATEPACK_EXPAND(GATEPACK_CUDA_ARCHS) << '"';
#else
  json << "null";
#endif
  json << "}";
  return json.str();
}

}  // namespace

STABLE_TORCH_LIBRARY(gatepack, m) {
#define GATEPACK_SCHEMA(text) m.def(text);
#include "schemas.h"
#undef GATEPACK_SCHEMA
  m.def("build_info() -> str");
  m.def("set_simd_level(str level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gatepack, CPU, m) {
  m.impl("fold_pack", TORCH_BOX(&fold_pack_cpu));
  m.impl("pack_rows", TORCH_BOX(&pack_rows_cpu));
  m.impl("fold_pack_adjoint", TORCH_BOX(&fold_pack_adjoint_cpu));
  m.impl("pack_tensors", TORCH_BOX(&pack_tensors<run_cpu>));
  m.impl("pack_tensors_out", TORCH_BOX(&pack_tensors_out<run_cpu>));
  m.impl("unpack_tensors", TORCH_BOX(&unpack_tensors<run_cpu>));
  m.impl("unpack_tensors_out", TORCH_BOX(&unpack_tensors_out<run_cpu>));
  m.impl("open_sets", TORCH_BOX(&open_sets_cpu));
  m.impl("remap_ids", TORCH_BOX(&remap_ids_cpu));
  m.impl("open_linear", TORCH_BOX(&open_linear_cpu));
  m.impl("open_linear_backward", TORCH_BOX(&open_linear_backward_cpu));
  m.impl("swiglu", TORCH_BOX(&swiglu_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cpu));
  m.impl("gate_lanes", TORCH_BOX(&gate_lanes_cpu));
  m.impl("gate_lanes_backward", TORCH_BOX(&gate_lanes_backward_cpu));
  m.impl("column_products", TORCH_BOX(&column_products_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(gatepack, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("set_simd_level", TORCH_BOX(&set_simd_level));
}

}  // namespace gatepack

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
