"""Training and detection image by image, with as many rows as there are: what the slots of a batch must equal.

Layers are those of the model. Matching, selection, NMS, sampling, mask targets and losses are written again, with
torchvision's operations.
"""

import pycocotools.mask
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_iou, nms, roi_align, sigmoid_focal_loss

from mimdet.detection.assignment import outside_images, subsample_labels
from mimdet.modeling.areas import areas_of, levels_of


def match(matcher, boxes, candidates, outside=None):
    """Detectron2's matcher on a matrix of overlaps: index and label of each candidate."""
    if not len(boxes):
        return torch.zeros(len(candidates), dtype=torch.int64), torch.full((len(candidates),), matcher.labels[0])
    iou = box_iou(boxes, candidates).nan_to_num(0.0)
    if outside is not None:
        iou = iou.masked_fill(outside, -1.0)
    best, index = iou.max(dim=0)
    labels = torch.tensor(matcher.labels)[sum((best >= t).long() for t in matcher.thresholds)]
    if matcher.allow_low_quality_matches:
        labels[(iou == iou.max(dim=1, keepdim=True).values).any(dim=0)] = 1
    return index, labels


def classes_of(target, index, labels, num_classes):
    if not len(target["boxes"]):
        return torch.full_like(index, num_classes)
    return torch.where(labels == 1, target["labels"][index], num_classes).masked_fill(labels < 0, -1)


def clip(boxes, size):
    height, width = size
    return torch.stack([boxes[..., i].clamp(0, side) for i, side in enumerate((width, height, width, height))], dim=-1)


def nms_of_groups(boxes, scores, groups, threshold):
    """Rows that stay, best first."""
    rows = [(groups == group).nonzero()[:, 0] for group in groups.unique()]
    stays = [r[nms(boxes[r], scores[r], threshold)] for r in rows] or [groups]
    rows = torch.cat(stays).sort().values
    return rows[scores[rows].sort(descending=True, stable=True).indices]


def anchors_of(part, features, names):
    levels = [features[name] for name in names]
    areas = levels_of(features, part.anchor_generator.strides)
    outside = outside_images(areas, part.anchor_generator.num_anchors)
    return levels, areas, part.anchor_generator(levels), outside


def proposals(rpn, features, sizes, targets=None, noise=None):
    """Boxes of each image, and losses."""
    levels, areas, anchors, outside = anchors_of(rpn, features, rpn.in_features)
    logits, deltas = rpn.rpn_head(levels, areas)
    losses = {}
    if targets is not None:
        every, flat, moved = torch.cat(anchors), torch.cat(logits, 1), torch.cat(deltas, 1)
        hidden = None if outside is None else torch.cat(outside, 1)
        cls = loc = 0.0
        for i, target in enumerate(targets):
            index, labels = match(rpn.anchor_matcher, target["boxes"], every, None if hidden is None else hidden[i])
            if hidden is not None:
                labels[hidden[i]] = -1
            rows, used = subsample_labels(
                labels[None], rpn.batch_size_per_image, rpn.positive_fraction, noise[i : i + 1]
            )
            rows = rows[used]
            is_object = labels[rows] == 1
            cls = cls + F.binary_cross_entropy_with_logits(flat[i][rows], is_object.float(), reduction="sum")
            rows = rows[is_object]
            boxes = target["boxes"][index[rows]] if len(target["boxes"]) else every[rows]
            deltas_of_truth = rpn.box2box_transform.get_deltas(every[rows], boxes)
            loc = loc + F.smooth_l1_loss(moved[i][rows], deltas_of_truth, beta=rpn.smooth_l1_beta, reduction="sum")
        scale = rpn.loss_weight / (rpn.batch_size_per_image * len(targets))
        losses = {"loss_rpn_cls": cls * scale, "loss_rpn_loc": loc * scale}
    pre, post = (pair[0 if targets is not None else 1] for pair in (rpn.pre_nms_topk, rpn.post_nms_topk))
    results = []
    for i, size in enumerate(sizes):
        boxes, scores, level_of = [], [], []
        for n, (anchor, logit, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
            score = logit[i].detach() if outside is None else logit[i].detach().masked_fill(outside[n][i], -torch.inf)
            score, index = score.sort(descending=True, stable=True)
            score, index = score[:pre], index[:pre]
            boxes.append(rpn.box2box_transform.apply_deltas(delta[i].detach()[index], anchor[index]))
            scores.append(score)
            level_of.append(torch.full_like(index, n))
        boxes, scores, level_of = torch.cat(boxes), torch.cat(scores), torch.cat(level_of)
        keep = boxes.isfinite().all(dim=1) & scores.isfinite()
        boxes = clip(boxes, size)
        keep &= (boxes[:, 2:] - boxes[:, :2] > rpn.min_box_size).all(dim=1)
        boxes, scores, level_of = boxes[keep], scores[keep], level_of[keep]
        results.append(boxes[nms_of_groups(boxes, scores, level_of, rpn.nms_thresh)[:post]])
    return results, losses


def pool(pooler, features, names, boxes):
    """(rows of all images, C, S, S)."""
    slots = nn.utils.rnn.pad_sequence(boxes, batch_first=True)
    valid = torch.arange(slots.shape[1]) < torch.tensor([len(b) for b in boxes])[:, None]
    return pooler([features[name] for name in names], slots, valid, areas_of(features))[valid.flatten()]


def sample(heads, boxes_of_images, targets, noise, first_truth):
    """Boxes, classes, matched index and matched box of the sample of each image."""
    results = []
    for i, (boxes, target) in enumerate(zip(boxes_of_images, targets, strict=True)):
        numbers = torch.cat([noise[i, : len(boxes)], noise[i, first_truth : first_truth + len(target["boxes"])]])
        boxes = torch.cat([boxes, target["boxes"]])
        index, labels = match(heads.proposal_matcher, target["boxes"], boxes)
        rows, used = subsample_labels(labels[None], heads.batch_size_per_image, heads.positive_fraction, numbers[None])
        rows = rows[used]
        results.append((boxes[rows], *matched(target, index[rows], labels[rows], boxes[rows], heads.num_classes)))
    return results


def matched(target, index, labels, boxes, num_classes):
    """Class, index and box of the ground truth; the box itself where there is none."""
    truth = target["boxes"][index] if len(target["boxes"]) else boxes
    return classes_of(target, index, labels, num_classes), index, truth


def box_losses(predictor, scores, deltas, samples):
    boxes, classes, _, truth = (torch.cat(column) for column in zip(*samples, strict=True))
    count = max(len(classes), 1)
    losses = {"loss_cls": F.cross_entropy(scores, classes, reduction="sum") / count}
    rows = (classes < predictor.num_classes).nonzero()[:, 0]
    delta = deltas.unflatten(1, (predictor.num_boxes, 4))[rows, classes[rows].clamp(max=predictor.num_boxes - 1)]
    deltas_of_truth = predictor.box2box_transform.get_deltas(boxes[rows], truth[rows])
    loc = F.smooth_l1_loss(delta, deltas_of_truth, beta=predictor.smooth_l1_beta, reduction="sum")
    return losses | {"loss_box_reg": loc / count}


def mask_targets(masks, boxes, size):
    """Of one mask each, polygons or a bitmap, by pycocotools or torchvision."""
    results = []
    for mask, box in zip(masks, boxes, strict=True):
        if isinstance(mask, torch.Tensor):
            rois = torch.cat([box.new_zeros(1), box])[None]
            results.append(roi_align(mask[None, None].float(), rois, size, 1.0, 0, aligned=True)[0, 0] >= 0.5)
            continue
        corner, side = box[:2].double().numpy(), (box[2:].double() - box[:2].double()).clamp(min=0.1).numpy()
        parts = [((polygon.reshape(-1, 2) - corner) * (size / side)).flatten() for polygon in mask]
        rle = pycocotools.mask.merge(pycocotools.mask.frPyObjects(parts, size, size))
        results.append(torch.from_numpy(pycocotools.mask.decode(rle)).bool())
    return torch.stack(results) if results else torch.zeros(0, size, size, dtype=torch.bool)


def mask_losses(heads, features, samples, targets):
    keep = [s[1] < heads.num_classes for s in samples]
    boxes = [s[0][k] for s, k in zip(samples, keep, strict=True)]
    classes = torch.cat([s[1][k] for s, k in zip(samples, keep, strict=True)])
    logits = heads.mask_head(pool(heads.mask_pooler, features, heads.mask_in_features, boxes), classes)
    truth = [[t["masks"][int(i)] for i in s[2][k]] for s, k, t in zip(samples, keep, targets, strict=True)]
    masks = torch.cat([mask_targets(m, b, logits.shape[-1]) for m, b in zip(truth, boxes, strict=True)])
    loss = F.binary_cross_entropy_with_logits(logits, masks.float()) if len(masks) else logits.sum() * 0.0
    return {"loss_mask": loss}, masks


def train(model, images, targets, noise):
    """Losses, and what was chosen: proposals, samples of the first stage and mask targets of each image.

    Args:
        noise: numbers of "anchors" and of "proposals".
    """
    batch = model.preprocess(images)
    features, sizes = model.backbone(batch), batch.image_sizes
    if not hasattr(model, "roi_heads"):
        return _train_retinanet(model, features, targets), None
    rpn, heads = model.proposal_generator, model.roi_heads
    boxes_of_images, losses = proposals(rpn, features, sizes, targets, noise["anchors"])
    first = samples = sample(heads, boxes_of_images, targets, noise["proposals"], rpn.post_nms_topk[0])
    for stage, (head, predictor) in enumerate(_stages(heads)):
        pooled = pool(heads.box_pooler, features, heads.box_in_features, [s[0] for s in samples])
        if len(_stages(heads)) > 1:
            pooled.register_hook(lambda grad: grad * (1 / 3))
        scores, deltas = predictor(head(pooled))
        name = f"_stage{stage}" if len(_stages(heads)) > 1 else ""
        losses |= {k + name: v for k, v in box_losses(predictor, scores, deltas, samples).items()}
        if stage + 1 == len(_stages(heads)):
            break
        moved = predictor.box2box_transform.apply_deltas(deltas.detach(), torch.cat([s[0] for s in samples]))
        following = []
        for boxes, target, size in zip(moved.split([len(s[0]) for s in samples]), targets, sizes, strict=True):
            boxes = clip(boxes.nan_to_num(0.0), size)
            boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
            index, labels = match(heads.proposal_matchers[stage + 1], target["boxes"], boxes)
            following.append((boxes, *matched(target, index, labels, boxes, heads.num_classes)))
        samples = following
    of_masks, masks = mask_losses(heads, features, first, targets)
    return losses | of_masks, (boxes_of_images, first, masks)


def _stages(heads):
    several = isinstance(heads.box_head, nn.ModuleList)
    return (
        list(zip(heads.box_head, heads.box_predictor, strict=True))
        if several
        else [(heads.box_head, heads.box_predictor)]
    )


def _train_retinanet(model, features, targets):
    levels, areas, anchors, outside = anchors_of(model, features, model.head_in_features)
    anchors = torch.cat(anchors)
    logits, deltas = (torch.cat(parts, dim=1) for parts in model.head(levels, areas))
    hidden = None if outside is None else torch.cat(outside, 1)
    cls, loc, count = 0.0, 0.0, 0
    for i, target in enumerate(targets):
        index, labels = match(model.anchor_matcher, target["boxes"], anchors, None if hidden is None else hidden[i])
        classes = classes_of(target, index, labels, model.num_classes)
        if hidden is not None:
            classes[hidden[i]] = -1
        rows = (classes >= 0).nonzero()[:, 0]
        one_hot = F.one_hot(classes[rows], model.num_classes + 1)[:, :-1].float()
        cls = cls + sigmoid_focal_loss(logits[i][rows], one_hot, model.focal_loss_alpha, model.focal_loss_gamma, "sum")
        rows = ((classes >= 0) & (classes < model.num_classes)).nonzero()[:, 0]
        deltas_of_truth = model.box2box_transform.get_deltas(anchors[rows], target["boxes"][index[rows]])
        loc = loc + F.smooth_l1_loss(deltas[i][rows], deltas_of_truth, beta=model.smooth_l1_beta, reduction="sum")
        count += len(rows)
    normalizer = 0.9 * float(model.loss_normalizer) + 0.1 * max(count, 1)
    return {"loss_cls": cls / normalizer, "loss_box_reg": loc / normalizer}


@torch.no_grad()
def detect(model, images):
    """Boxes, scores and labels of each image, in its pixels."""
    batch = model.preprocess(images)
    features, sizes = model.backbone(batch), batch.image_sizes
    if not hasattr(model, "roi_heads"):
        return _detect_retinanet(model, features, sizes)
    heads = model.roi_heads
    boxes, _ = proposals(model.proposal_generator, features, sizes)
    counts, total = [len(b) for b in boxes], 0.0
    for head, predictor in _stages(heads):
        pooled = pool(heads.box_pooler, features, heads.box_in_features, boxes)
        scores, deltas = predictor(head(pooled))
        moved = predictor.box2box_transform.apply_deltas(deltas, torch.cat(boxes))
        finite = moved.isfinite().all(dim=1, keepdim=True)
        total = total + scores.softmax(dim=1).masked_fill(~finite, torch.nan)
        boxes = [clip(b.nan_to_num(0.0), size) for b, size in zip(moved.split(counts), sizes, strict=True)]
    total = total[:, :-1] * (1 / len(_stages(heads)))
    results = []
    for box, score, size in zip(moved.split(counts), total.split(counts), sizes, strict=True):
        box = box.unflatten(1, (predictor.num_boxes, 4))
        fine = box.isfinite().flatten(1).all(dim=1) & score.isfinite().all(dim=1)
        row, label = ((score > predictor.test_score_thresh) & fine[:, None]).nonzero(as_tuple=True)
        box, score = clip(box[row, label.clamp(max=predictor.num_boxes - 1)], size), score[row, label]
        keep = nms_of_groups(box, score, label, predictor.test_nms_thresh)[: predictor.test_topk_per_image]
        keep = keep[(box[keep][:, 2:] > box[keep][:, :2]).all(dim=1)]
        results.append((box[keep], score[keep], label[keep]))
    return results


def _detect_retinanet(model, features, sizes):
    levels, areas, anchors, outside = anchors_of(model, features, model.head_in_features)
    logits, deltas = model.head(levels, areas)
    results = []
    for i, size in enumerate(sizes):
        columns = []
        for n, (anchor, logit, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
            score = logit[i].sigmoid()
            if outside is not None:
                score = score.masked_fill(outside[n][i, :, None], -torch.inf)
            row, label = (score > model.test_score_thresh).nonzero(as_tuple=True)
            best, order = score[row, label].sort(descending=True, stable=True)
            best, order = best[: model.test_topk_candidates], order[: model.test_topk_candidates]
            boxes = model.box2box_transform.apply_deltas(delta[i][row[order]], anchor[row[order]])
            fine = boxes.isfinite().all(dim=1)
            columns.append((boxes[fine], best[fine], label[order][fine]))
        boxes, scores, labels = (torch.cat(column) for column in zip(*columns, strict=True))
        keep = nms_of_groups(boxes, scores, labels, model.test_nms_thresh)[: model.max_detections_per_image]
        boxes = clip(boxes[keep], size)
        full = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        results.append((boxes[full], scores[keep][full], labels[keep][full]))
    return results
