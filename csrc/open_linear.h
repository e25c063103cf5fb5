// Products of few tokens with the open part of a weight where it lies: nothing is packed. With x
// and y on open lanes only,
//
//   open_linear           y[t, i] = z_out[i] * (sum_c w[rows[i], cols[c]] * z_in[c] * x[t, c]
//                                               + bias[rows[i]])
//   open_linear_backward  dx, dz_in and dz_out of it from dy
//
// Rows of w that are closed are never read. Closed columns are, times 0: next to open ones they
// share their cache lines.
#pragma once

#include "layout.h"

#include <tuple>

namespace gatepack {

Tensor open_linear_cpu(const Tensor& x, const Tensor& w, const OptTensor& bias,
                       const OptTensor& rows, const OptTensor& cols, const OptTensor& z_out,
                       const OptTensor& z_in, int64_t out_lanes, int64_t in_lanes);

std::tuple<Tensor, Tensor, Tensor> open_linear_backward_cpu(
    const Tensor& dy, const OptTensor& x, const OptTensor& y, const Tensor& w,
    const OptTensor& rows, const OptTensor& cols, const OptTensor& z_out, const OptTensor& z_in,
    int64_t out_lanes, int64_t in_lanes);

}  // namespace gatepack
