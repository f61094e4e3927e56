"""Hard inputs of token sampling."""

import torch


def sampling_cases(longest):
    """name -> (noise, valid_mask, ratio); ``longest`` tokens at most."""
    generator = torch.Generator().manual_seed(3)

    def uniform(batch, length):
        return torch.rand(batch, length, generator=generator)

    def everything(noise):
        return torch.ones_like(noise, dtype=torch.bool)

    cases = {}
    for length in (1, 2, 31, 32, 33, 255, 256, 257, 1023, 1025, 4200):
        if length <= longest:
            noise = uniform(3, length)
            cases[f"uniform-{length}"] = noise, everything(noise), 0.5
    length = min(longest, 777)
    noise = uniform(3, length)
    for ratio in (0.001, 0.125, 0.3, 0.7, 0.999, 1.0):
        cases[f"ratio-{ratio}"] = noise, everything(noise), ratio
    few = (noise * 3).floor() / 4
    cases["heavy-ties"] = few, everything(few), 0.5
    equal = torch.full_like(noise, 0.25)
    cases["all-equal"] = equal, everything(equal), 0.4
    cases["all-zero"] = torch.zeros_like(noise), everything(noise), 0.4
    cases["all-padding"] = noise, torch.zeros_like(noise, dtype=torch.bool), 0.5
    holes = uniform(3, length) > torch.tensor([[0.9], [0.5], [0.1]])
    cases["padding"] = noise, holes, 0.5
    cases["padding-and-ties"] = few, holes, 0.5
    cases["one-valid"] = noise, torch.arange(length).expand(3, -1) == length - 1, 0.5
    # Noise is in [0, 1), but any float must be ordered as argsort does.
    positive = torch.tensor([0.0, 1e-45, 1.0, 3e38, torch.inf, torch.nan])
    special = torch.cat([positive, -positive])
    strange = special[torch.randint(len(special), (3, length), generator=generator)]
    for ratio in (0.1, 0.5, 0.9):
        cases[f"strange-{ratio}"] = strange, holes, ratio
    cases["transposed"] = uniform(length, 3).t(), uniform(length, 3).t() > 0.3, 0.5
    cases["no-images"] = noise[:0], holes[:0], 0.5
    cases["no-tokens"] = noise[:, :0], holes[:, :0], 0.5
    return cases


def packed_cases():
    """name -> (noise, sizes, grid, ratio) for tokens of images of several sizes."""
    generator = torch.Generator().manual_seed(4)
    grid = 9, 31
    noise = torch.rand(4, 9 * 31, generator=generator)
    sizes = [(9, 31), (1, 1), (5, 30), (9, 2)]
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5])
    strange = special[torch.randint(len(special), noise.shape, generator=generator)]
    return {
        "sizes": (noise, sizes, grid, 0.5),
        "at-least-one": (noise, sizes, grid, 0.001),
        "everything": (noise, sizes, grid, 1.0),
        "ties": ((noise * 3).floor(), sizes, grid, 0.3),
        # Valid tokens come before padding, whatever their noise.
        "strange": (strange, sizes, grid, 0.9),
        "no-images": (noise[:0], [], grid, 0.5),
    }
