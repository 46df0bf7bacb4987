"""`bitplan apply`. May import: everything."""

from argparse import Namespace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitplan.formats.errors import UsageError
from bitplan.formats.sizes import format_bytes
from bitplan.planner.assemble import refinished
from bitplan.planner.codes import refuse_missing
from bitplan.planner.commands.common import emit, memory_of, texts_of
from bitplan.planner.export.gptq_layout import added_scales, refuse_unsupported, save_gptq
from bitplan.planner.load import find_for, load_planned, make_codes, resident_bytes
from bitplan.planner.plan import Plan
from bitplan.planner.report.model_card import refuse_folder, save
from bitplan.planner.report.tables import with_error
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.loss import finite, refuse_foreign_tokens, refuse_not_finite
from bitplan.sensitivity.profile import read
from bitplan.sensitivity.session import open_session


def run(arguments: Namespace) -> None:
    refuse_folder(arguments.save, arguments.force)
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UsageError("--prompt is empty: give some text to go on from")
    plan = refinished(read(arguments.plan, Plan), arguments.rounding, arguments.heal)
    if arguments.layout == "gptq":
        if arguments.save is None:
            raise UsageError("--layout gptq is the layout of a saved checkpoint: give --save DIR")
        refuse_unsupported(plan)
    plan, source = find_for(plan, arguments.model, arguments.trust_remote_code)
    memory = memory_of(arguments)
    make_codes(plan, source, arguments.text, arguments.device, memory)
    refuse_missing(plan)
    reference = None
    if arguments.text or arguments.dataset or arguments.sample or arguments.heldout:
        texts = texts_of(arguments, source)
        reference = open_session(source, texts, device=arguments.device, memory=memory).reference(texts.heldout)
    model = load_planned(plan, source, arguments.device)
    size = resident_bytes(model)
    data: dict[str, Any] = {
        "resident_bytes": size,
        "planned_bytes": plan.bytes,
        "bits_per_weight": size * 8 / plan.provenance.model.parameters,
        "device": str(model.device),
        "rounding": plan.rounding,
    }
    text = [
        f"resident {size:,} bytes ({format_bytes(size)}), planned {plan.bytes:,};"
        f" {data['bits_per_weight']:.3f} bits per weight; rounding: {plan.rounding}"
    ]
    if plan.research:
        data["research"] = plan.research
        text.append(f"research stage: {', '.join(plan.research)}")
    if reference is not None:
        evaluation = refuse_not_finite(reference.evaluate(model, plan.workload.kv_format), model)
        data |= {"nll": evaluation.nll, "ppl": evaluation.ppl, "kl": evaluation.kl, "kl_se": finite(evaluation.kl_se)}
        data |= {
            "delta_nll": evaluation.delta_nll,
            "delta_nll_se": finite(evaluation.delta_nll_se),
            "tokens": evaluation.tokens,
        }
        text.append(
            f"{evaluation.tokens:,} held-out tokens: perplexity {evaluation.ppl:.3f},"
            f" KL {with_error(f'{evaluation.kl:.5f}', evaluation.kl_se)}"
        )
    if arguments.save:
        data["saved"] = str(arguments.save)
        if arguments.layout == "gptq":
            data["saved_bytes"] = save_gptq(model, plan, source, arguments.save, arguments.force)
            text.append(f"saved to {arguments.save} in GPTQ's layout, {data['saved_bytes']:,} bytes")
            text += added_scales(plan.packed)
        else:
            save(model, plan, source, arguments.save, arguments.force)
            text.append(f"saved to {arguments.save}")
    if arguments.prompt is not None:
        data["text"] = _continue(model, sources.load_tokenizer(source), arguments.prompt)
        text.append(data["text"])
    emit(arguments, data, "\n".join(text))


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs["input_ids"].numel():
        raise UsageError("--prompt holds no token: give some text")
    refuse_foreign_tokens(model, inputs["input_ids"])
    out = model.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=64,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
