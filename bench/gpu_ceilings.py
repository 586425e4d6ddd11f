"""What the device can do at most: copy bandwidth, matrix products, the cost of a launch. Measured before anything is compared to it."""

import harness
import torch


def main():
    options = harness.arguments(__doc__)
    kind = options.device.type
    rows = {"copy" if kind == "cuda" else "read": {"gbs": f"{harness.bandwidth_gbs(kind):.5g}"}}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        rows[f"product {name}"] = {"dtype": name, "tflops": f"{harness.matmul_tflops(kind, dtype):.4g}"}
    if kind == "cuda":
        x = torch.zeros(1, device="cuda")
        rows["launch from Python"] = {"ms": f"{harness.launch_us() / 1e3:.4g}"}
        rows["launch in a graph"] = {"ms": f"{harness.graph_ms(lambda: x.add_(1)):.4g}"}
    shown = [{"variant": name, **row} for name, row in rows.items()]
    if options.csv:
        for row in shown:
            harness.write_row("ceilings", kind, **row)
    harness.print_table(f"ceilings of {harness.device_name(kind)}", shown)


if __name__ == "__main__":
    main()
