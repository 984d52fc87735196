import pytest
import torch
from diffusers import DDPMScheduler

from tudsr_core.diffusion.one_step import euler, from_noise_level, residual
from tudsr_core.diffusion.schedule import comfy_start_scale, scaled_linear
from tudsr_core.methods.published import METHODS

# t: (abar, sqrt(abar), sqrt(1 - abar), sigma), six digits, independent of this code.
TABLE = {
    1: (0.998296, 0.999148, 0.041279, 0.041314),
    50: (0.951577, 0.975488, 0.220052, 0.225582),
    199: (0.755238, 0.869045, 0.494734, 0.569285),
    200: (0.753692, 0.868154, 0.496294, 0.571666),
    273: (0.635743, 0.797335, 0.603537, 0.756944),
    999: (0.004660, 0.068265, 0.997667, 14.614641),
}


@pytest.mark.parametrize(("t", "row"), TABLE.items())
def test_schedule_equals_the_published_numbers(t, row):
    abar = scaled_linear().abar_at(t)
    made = abar, abar**0.5, (1 - abar) ** 0.5, scaled_linear().sigma_at(t)
    assert made == pytest.approx(row, rel=2e-6, abs=6e-7)


def test_schedule_equals_diffusers_at_every_timestep():
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    assert torch.allclose(scaled_linear().abar, theirs.double(), rtol=2e-5)


@pytest.mark.parametrize("t", [1, 50, 200, 273, 999])
def test_one_step_equals_the_closed_form_in_float64(t, noise):
    z, eps = noise(2, 4, 8, 8) - 0.5, noise(2, 4, 8, 8, seed=1) - 0.5
    abar = 1.0
    for i in range(t + 1):
        beta = (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2
        abar *= 1 - beta
    wanted = (z.double() - (1 - abar) ** 0.5 * eps.double()) / abar**0.5
    step = from_noise_level(t)
    error = (step.finish(step.start(z), eps) - wanted).abs().max()
    assert error < 1e-5 * max(1, float(wanted.abs().max()))


def test_osediff_at_999_equals_a_ddpm_step_to_minus_one(noise):
    z, eps = noise(1, 4, 8, 8).double(), noise(1, 4, 8, 8, seed=1).double()
    abar, previous = scaled_linear().abar_at(999), 1.0
    original = (z - (1 - abar) ** 0.5 * eps) / abar**0.5
    alpha = abar / previous
    mean = previous**0.5 * (1 - alpha) / (1 - abar) * original + alpha**0.5 * (1 - previous) / (1 - abar) * z
    step = from_noise_level(999)
    assert torch.allclose(step.finish(z.float(), eps.float()).double(), mean, rtol=1e-4, atol=1e-4)


def test_comfy_identity(noise):
    """Calling a k-diffusion style EPS model at sigma on z sqrt(1 + sigma^2) gives z_H."""
    z = noise(1, 4, 8, 8).double()

    def unet(x, t):
        return (x * 3).sin() + t / 1000

    for t in (0, 50, 200, 999):
        sigma = scaled_linear().sigma_at(t)
        x = z * comfy_start_scale(t)
        denoised = x - sigma * unet(x / (sigma**2 + 1) ** 0.5, t)
        step = from_noise_level(t)
        wanted = step.p * z + step.q * unet(z, t)
        assert torch.allclose(denoised, wanted, rtol=1e-10, atol=1e-10)


def test_pisa_residual_step(noise):
    z, eps = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1)
    assert torch.equal(residual().finish(z, eps), z - eps)


def test_pisa_dials_are_a_weighted_sum_of_two_passes(noise):
    """l_pix eps_pix + l_sem (eps_full - eps_pix) equals weights (l_pix - l_sem, l_sem)."""
    z, pix, full = (noise(1, 4, 8, 8, seed=i) for i in range(3))
    for l_pix, l_sem in ((1, 1), (0.7, 1.3), (0, 1)):
        wanted = z - (l_pix * pix + l_sem * (full - pix))
        assert torch.allclose(residual().finish(z, (l_pix - l_sem) * pix + l_sem * full), wanted, atol=1e-6)


@pytest.mark.parametrize("timesteps", [(199,), (199, 99, 49), (249, 199, 149, 99, 49)])
def test_invsr_vp_form_equals_its_euler_steps(noise, timesteps):
    """x = z + sigma n; then x <- x + (sigma' - sigma) eps(x / sqrt(1 + sigma^2)) down to zero."""
    z, n = noise(1, 4, 8, 8).double(), noise(1, 4, 8, 8, seed=1).double()
    sigmas = [scaled_linear().sigma_at(t) for t in timesteps] + [0.0]

    def unet(x, t):
        return (x * 2).cos() + t / 1000

    x = z + sigmas[0] * n
    for t, sigma, after in zip(timesteps, sigmas, sigmas[1:], strict=False):
        x = x + unet(x / (1 + sigma**2) ** 0.5, t) * (after - sigma)
    steps = euler(timesteps)
    ours = steps[0].start(z, n)
    for step in steps:
        ours = step.finish(ours, unet(ours.double(), step.t))
    assert [step.t for step in steps] == list(timesteps)
    assert (ours.double() - x).abs().max() < 1e-5


def test_osediff_closed_form_equals_the_ddpm_posterior_mean(noise):
    """The DDPM step t = 999 -> "-1" (alpha_prev = 1), written out from its two coefficients."""
    z, eps = noise(1, 4, 8, 8).double(), noise(1, 4, 8, 8, seed=1).double()
    abar, before = scaled_linear().abar_at(999), 1.0
    alpha = abar / before
    start = (z - (1 - abar) ** 0.5 * eps) / abar**0.5
    mean = before**0.5 * (1 - alpha) / (1 - abar) * start + alpha**0.5 * (1 - before) / (1 - abar) * z
    assert torch.allclose(METHODS["osediff"].steps()[0].finish(z, eps).double(), mean, rtol=1e-4)


def test_the_methods_have_their_published_timesteps():
    table = {name: [step.t for step in method.steps()] for name, method in METHODS.items()}
    assert table == {"tudsr": [200], "omgsr": [273], "hypir": [200], "osediff": [999], "pisa-sr": [1], "invsr": [199]}
    assert METHODS["tudsr"].steps(stage=2)[0].t == 50 and METHODS["hypir"].steps(stage=2)[0].t == 200
    assert METHODS["omgsr"].steps(timestep=195)[0] == from_noise_level(195)
    for name in ("pisa-sr", "invsr"):
        with pytest.raises(ValueError, match="part of the method"):
            METHODS[name].steps(timestep=50)
    with pytest.raises(ValueError, match="cannot run in 6 steps"):
        METHODS["invsr"].steps(count=6)


def test_missing_noise_and_wrong_timesteps_are_refused(noise):
    with pytest.raises(ValueError, match="noise"):
        euler((199,))[0].start(noise(1, 4, 8, 8))
    with pytest.raises(ValueError, match="must fall"):
        euler((99, 199))
    for t in (-1, 1000):
        with pytest.raises(ValueError, match="timestep"):
            from_noise_level(t)
