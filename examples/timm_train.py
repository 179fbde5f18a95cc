"""IRKD in timm's own training script: python examples/timm_train.py PATH/train.py DATA --kd-model-name NAME [options]

train.py is timm's, from its repository, in a version that has timm.task (tried with 1.0.31). Its logit distillation
gets the saliency term; teacher, weights, temperature and all else stay timm's options. IRKD_GAMMA is the weight of the
term, IRKD_TAPS where the maps are taken.
"""

import os
import runpy
import sys

import timm.task
from torch.nn.parallel import DistributedDataParallel

import irkd_dist


class IrkdTask(timm.task.LogitDistillationTask):
    def __init__(self, student_model, *arguments, **options):
        super().__init__(student_model, *arguments, **options)
        teacher, taps = self.teacher.model, os.environ.get("IRKD_TAPS", "first,second,last").split(",")
        teacher.register_forward_pre_hook(
            lambda _, images: self.teacher.normalize_input(images[0], self.student_mean, self.student_std)
        )
        self.align = irkd_dist.SaliencyLoss(student_model, teacher, taps=taps)

    def prepare_distributed(self, device_ids=None, **options):
        self.align = DistributedDataParallel(self.align, device_ids=device_ids, **options)
        return self

    def forward(self, input, target):
        output, said, saliency = self.align(input, target)
        task, kd = self.criterion(output, target), irkd_dist.distillation_loss(output, said, self.temperature)
        loss = self.task_loss_weight * task + self.distill_loss_weight * kd
        loss = loss + float(os.environ.get("IRKD_GAMMA", "0.8")) * saliency
        return {"loss": loss, "output": output, "task_loss": task, "kd_loss": kd, "saliency_loss": saliency}


if __name__ == "__main__":
    timm.task.LogitDistillationTask = IrkdTask
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
