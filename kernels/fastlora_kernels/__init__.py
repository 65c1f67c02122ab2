"""Hand-written Triton kernels, their launch plans and the GPU facts behind them. Never imports fastlora."""
