"""The control plane: enrols devices, decides who computes what, repairs the plan. It holds no text, id or activation."""
