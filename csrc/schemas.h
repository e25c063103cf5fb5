// Every op schema of gatepack._C. ops.cpp includes this to define them; python/gatepack/_ext.py
// reads the quoted texts where the extension is absent and plain torch takes its place.

GATEPACK_SCHEMA("fold_pack(Tensor w, Tensor? rows, Tensor? cols, Tensor? z_out, Tensor? z_in, "
                "ScalarType? dtype, bool stream=False) -> Tensor")
GATEPACK_SCHEMA("pack_rows(Tensor w, Tensor rows) -> Tensor")
GATEPACK_SCHEMA("fold_pack_adjoint(Tensor g, Tensor? rows, Tensor? cols, Tensor? z_out, "
                "Tensor? z_in, SymInt O, SymInt I, ScalarType? dtype) -> Tensor")
GATEPACK_SCHEMA("pack_tensors(Tensor[] w, Tensor?[] rows, Tensor?[] cols, Tensor?[] z_out, "
                "Tensor?[] z_in, Tensor?[] lora_a, Tensor?[] lora_b, float[] lora_scale, "
                "int[] row_multiple, int[] col_multiple, int[] order, ScalarType? dtype) "
                "-> (Tensor[], Tensor[])")
GATEPACK_SCHEMA("pack_tensors_out(Tensor[] w, Tensor?[] rows, Tensor?[] cols, Tensor?[] z_out, "
                "Tensor?[] z_in, Tensor?[] lora_a, Tensor?[] lora_b, float[] lora_scale, "
                "int[] row_multiple, int[] col_multiple, int[] order, ScalarType? dtype, "
                "Tensor(a!)[] out, Tensor(b!)[] scales) -> ()")
GATEPACK_SCHEMA("unpack_tensors(Tensor[] g, Tensor?[] rows, Tensor?[] cols, Tensor?[] z_out, "
                "Tensor?[] z_in, int[] O, int[] I, ScalarType? dtype) -> Tensor[]")
GATEPACK_SCHEMA("unpack_tensors_out(Tensor[] g, Tensor?[] rows, Tensor?[] cols, Tensor?[] z_out, "
                "Tensor?[] z_in, int[] O, int[] I, ScalarType? dtype, Tensor(a!)[] out) -> ()")
GATEPACK_SCHEMA("open_sets(Tensor[] masks) -> Tensor[]")
GATEPACK_SCHEMA("remap_ids(Tensor ids, Tensor table) -> Tensor")
GATEPACK_SCHEMA("open_linear(Tensor x, Tensor w, Tensor? bias, Tensor? rows, Tensor? cols, "
                "Tensor? z_out, Tensor? z_in, int out_lanes, int in_lanes) -> Tensor")
GATEPACK_SCHEMA("open_linear_backward(Tensor dy, Tensor? x, Tensor? y, Tensor w, Tensor? rows, "
                "Tensor? cols, Tensor? z_out, Tensor? z_in, int out_lanes, int in_lanes) "
                "-> (Tensor, Tensor, Tensor)")
GATEPACK_SCHEMA("swiglu(Tensor a, Tensor u, Tensor? z=None) -> Tensor")
GATEPACK_SCHEMA("swiglu_backward(Tensor dh, Tensor a, Tensor u, Tensor? z=None) "
                "-> (Tensor, Tensor, Tensor)")
GATEPACK_SCHEMA("gate_lanes(Tensor x, Tensor z, int lanes) -> Tensor")
GATEPACK_SCHEMA("gate_lanes_backward(Tensor dy, Tensor x, Tensor z, int lanes) -> (Tensor, Tensor)")
GATEPACK_SCHEMA("column_products(Tensor a, Tensor b) -> Tensor")
