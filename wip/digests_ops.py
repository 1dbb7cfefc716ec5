"""Digests of outputs and gradients on a fixed set of cases; the same lines before and after mean bit-identical results."""
import hashlib, warnings, torch, fastdense, itertools
from fastdense import _C
warnings.simplefilter("ignore")
torch.set_num_threads(2)
def dig(*ts):
    h = hashlib.sha256()
    for t in ts:
        if t is None: h.update(b"none"); continue
        h.update(str((t.dtype, tuple(t.shape))).encode()); h.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return h.hexdigest()[:16]
def step(name, net, x, train=True, dtype=None):
    torch.manual_seed(7)
    net.train(train); x = x.clone().requires_grad_()
    ctx = torch.autocast("cpu", dtype) if dtype else torch.no_grad() if False else torch.enable_grad()
    with ctx: y = net(x)
    ys = y if isinstance(y, (list, tuple)) else [y]
    g = torch.Generator().manual_seed(3)
    loss = sum((t.float() * torch.randn(t.shape, generator=g)).sum() for t in ys)
    gs = torch.autograd.grad(loss, [x, *net.parameters()], allow_unused=True)
    print(name, dig(*ys), dig(*gs), dig(*net.buffers()), flush=True)
def nets():
    import torchvision, timm
    yield "cifar40", lambda m: fastdense.models.densenet_cifar(40, 12, memory=m), (4, 3, 32, 32), ("balanced", "min")
    yield "tv121", lambda m: fastdense.convert(torchvision.models.densenet121(num_classes=10), memory=m), (2, 3, 64, 64), ("balanced", "min")
    yield "timm121", lambda m: fastdense.convert(timm.create_model("densenet121", num_classes=10), memory=m), (2, 3, 64, 64), ("balanced",)
    yield "dpn68", lambda m: fastdense.models.dpn68(num_classes=10, memory=m), (2, 3, 64, 64), ("balanced", "min", "reversible")
    yield "fcd56", lambda m: fastdense.models.fc_densenet56(num_classes=5, memory=m), (1, 3, 64, 64), ("balanced", "min")
    yield "rrdb", lambda m: fastdense.models.rrdbnet(blocks=2), (1, 3, 24, 24), ("x",)
    yield "rdn", lambda m: fastdense.models.rdn(blocks=2, layers=3), (1, 3, 20, 20), ("x",)
    yield "srdense", lambda m: fastdense.models.srdensenet(), (1, 1, 16, 16), ("x",)
    yield "highway", lambda m: fastdense.models.highway_cifar(), (2, 3, 32, 32), ("x",)
    yield "fractal", lambda m: fastdense.models.fractalnet(), (2, 3, 32, 32), ("x",)
    yield "rir", lambda m: fastdense.models.resnet_in_resnet(), (2, 3, 32, 32), ("x",)
    yield "sdepth", lambda m: fastdense.models.stochastic_depth_cifar(20), (2, 3, 32, 32), ("x",)
levels = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
for name, make, shape, modes in []:
    for m in modes:
        for level in levels:
            try: _C.set_simd_level(level)
            except ValueError: continue
            for train, dtype in ((True, None), (True, torch.bfloat16), (False, None)):
                if dtype is not None and level in ("baseline",): continue
                if name in ("tv121", "fcd56", "dpn68") and level in ("baseline", "avx2") and dtype: continue
                torch.manual_seed(1); net = make(m)
                step(f"{name} {m} {level} {train} {dtype}", net, torch.randn(shape), train, dtype)
for level in levels:
    try: _C.set_simd_level(level)
    except ValueError: continue
    for dt in (torch.float32, torch.float64, torch.bfloat16, torch.half):
        torch.manual_seed(2)
        b = fastdense.nn.DenseBlock(3, 16, growth_rate=8).to(dt); step(f"block {level} {dt}", b, torch.randn(2, 16, 9, 7).to(dt))
        t = fastdense.nn.Transition(16, 8).to(dt); step(f"transition {level} {dt}", t, torch.randn(2, 16, 8, 6).to(dt))
        b = fastdense.nn.DenseBlock(2, 16, growth_rate=4, spatial_dims=3, drop_rate=0.2).to(dt); step(f"block3d {level} {dt}", b, torch.randn(2, 16, 5, 4, 3).to(dt))
        d = fastdense.nn.ResidualDenseBlock(16, 8).to(dt); step(f"rdb {level} {dt}", d, torch.randn(1, 16, 13, 11).to(dt))
        for preset in ("torch", "torch_antialias", "pillow", "opencv", "matlab"):
            for s in (2, 0.5, 3.0, 0.37):
                x = torch.rand(1, 3, 17, 23).to(dt).requires_grad_(); y = fastdense.bicubic_resize(x, scale_factor=s, preset=preset)
                gr, = torch.autograd.grad(y.float().sum(), x); print("bicubic", level, dt, preset, s, dig(y, gr))
    u = (torch.rand(3, 17, 23) * 255).to(torch.uint8)[None]
    for preset in ("torch", "torch_antialias", "pillow", "opencv", "matlab"):
        for s in (2, 0.5): print("bicubic8", level, preset, s, dig(fastdense.bicubic_resize(u, scale_factor=s, preset=preset)))
