-- Shared by the limiter's scripts; the loader puts it in front of those that say `-- uses: _meter`.
--
-- A meter counts what one upstream was asked for one model. Its first eleven KEYS are always:
--   1 meter  2 used  3 tickets  4 held  5 line of interactive  6 line of batch  7 front  8 replies
--   9 meters  10 waiting  11 learned
--
-- How the limit holds over any window: a window (60 s) is 120 slots. A request counts in the slot of its grant and in
-- the 123 after it, so two grants that do not count together lie more than 123 slots, 61.5 s, apart. A ticket is used
-- within 3 slots (1.5 s) of its grant or given back, so such two reach the upstream more than 60 s apart: any 60 s at
-- the upstream hold only grants that were counted together, and those never exceed the limit. The same with 20 slots
-- for a sixth of the window, which gets at most a quarter. What is counted leaves after 124 slots, 62 s: under demand
-- 60/62 = 96.8 % of a limit are used. (A token bucket with rate r and burst B lets r * 60 + B through in 60 s, and a
-- refund into it may be spent where it was not taken from; a slot gives back exactly what it held.)
-- Each lane has counts of its own, since batch leaves `share` of every limit to interactive.
--
-- How the order holds on the way: tickets of one moment go to several workers, and whoever is quicker arrives first. So
-- while more wait than may be granted now, tickets are spaced, at the pace at which a sixth gets exactly its quarter: 1.5
-- times what a window sustains, so that nothing of a limit is lost. Where that pace leaves less than 100 ms between two,
-- those of 100 ms may come together, lest each cost a call; none is spaced by more than a sixtieth of a window, which is
-- enough for the order. When no more wait than may be granted, all are at once: a chat beside a batch waits for nobody.
-- Each worker that asks is told its own turn, one ticket after the other's, so that one call fetches one ticket and jobs
-- spread over the workers; a turn is at most 1 s late, so that a dead one's is taken over.

local call, KEYS, ARGV = redis.call, KEYS, ARGV
local floor, max, min = math.floor, math.max, math.min
local METER, USED, TICKETS, HELD, LINES, FRONT = KEYS[1], KEYS[2], KEYS[3], KEYS[4], {[0] = KEYS[5], KEYS[6]}, KEYS[7]
local MEASURES, WAITING, LEARNED = KEYS[9], KEYS[10], KEYS[11]

local SLOTS, SLACK = 120, 3
local KEPT = 86400000 -- ms: what a meter has learned about its answers
local TOGETHER, TURN, LATEST = 100, 50, 1000 -- ms: of pace in one call; between two turns; from a ticket to a turn
-- What changes with every call stands in one field, in this order: to read and write 17 costs four times as much.
local COUNTS = {'window', 'from', 'near', 'r', 't', 'br', 'bt', 'rn', 'tn', 'brn', 'btn', 'behind', 'streak', 'holding',
  'kept', 'step', 'turn'}
local PACKED, PACK, NONE = string.rep('(%S+) ', #COUNTS), string.rep('%.0f ', #COUNTS), string.rep('0 ', #COUNTS)
local FIELDS = {'counts', 'rpm', 'tpm', 'streams', 'share', 'cooling', 'pace', 'seen', 'narrow', 'served'}
local SELDOM = {'paced', 'base', 'rpm_seen', 'tpm_seen', 'mean', 'deviation', 'samples'} -- read where they are needed

local PARTS = {r = {near = 'rn', batch = 'br', batch_near = 'brn'}, t = {near = 'tn', batch = 'bt', batch_near = 'btn'}}

local clock = call('TIME')
local now = clock[1] * 1000 + floor(clock[2] / 1000)
local m, packed = {}, NONE
local width, slot, running, keep, count

local function int(number)
  return string.format('%.0f', number)
end

local function take(names, values, first)
  for i = first, #names do
    m[names[i]] = tonumber(values[i] or 0)
  end
end

local function read_seldom()
  if not m.samples then
    take(SELDOM, call('HMGET', METER, unpack(SELDOM)), 1)
  end
end

-- Take the slots before `first` out of the counts that end in `suffix`; returns the oldest slot that counts.
local function slide(from, first, suffix, drop)
  if from >= first then
    return from
  end
  local r, t, br, bt = 'r' .. suffix, 't' .. suffix, 'br' .. suffix, 'bt' .. suffix
  if first - from > SLOTS + SLACK then
    m[r], m[t], m[br], m[bt] = 0, 0, 0, 0
    if drop then
      call('DEL', USED)
    end
    return first
  end
  for i = from, first - 1 do
    if m[r] == 0 and m[t] == 0 then
      break
    end
    local v = call('HMGET', USED, 'r' .. i, 't' .. i, 'br' .. i, 'bt' .. i)
    local batch_r, batch_t = v[3] or 0, v[4] or 0
    m[r], m[t] = m[r] - (v[1] or 0) - batch_r, m[t] - (v[2] or 0) - batch_t
    m[br], m[bt] = m[br] - batch_r, m[bt] - batch_t
    if drop and (v[1] or v[2] or v[3] or v[4]) then
      call('HDEL', USED, 'r' .. i, 't' .. i, 'br' .. i, 'bt' .. i)
    end
  end
  return first
end

-- The window to count by when somebody asks by this one. Workers of two settings ask in turn for as long as a deploy takes,
-- and each change counts all anew: so the longer one holds for both, until nobody asked by it for as long as it is.
local function agreed(window)
  local narrow = m.narrow
  if window >= m.window then
    narrow = 0
  elseif narrow == 0 or narrow > now then
    narrow, window = now, m.window
  elseif now - narrow < m.window then
    window = m.window
  else
    narrow = 0
  end
  if narrow ~= m.narrow then
    call('HSET', METER, 'narrow', int(narrow))
  end
  return window
end

-- Read the meter and bring its counts up to now. `window` (ms) nil: as it was; `look`: and write nothing.
local function open_meter(window, look)
  local found = call('HMGET', METER, unpack(FIELDS))
  packed = found[1] or NONE
  take(COUNTS, {string.match(packed, PACKED)}, 1)
  take(FIELDS, found, 2)
  local function measure()
    width = max(1, math.ceil(m.window / SLOTS)) -- rounded down, the slots of a window would be less than a window
    slot = floor(now / width)
  end
  measure()
  window = window and agreed(window)
  local carried
  if not look and (window and m.window ~= window or m.near > slot) then
    -- Slots of another width, or of a server whose clock was ahead: what they hold counts as used now, and what was
    -- reserved there does not come back. Nor do places before the line last until a time that was.
    slide(m.from, slot - SLOTS - SLACK, '', false)
    carried = {[0] = {m.r - m.br, m.t - m.bt}, {m.br, m.bt}}
    call('DEL', USED, FRONT)
    local held = call('HGETALL', HELD)
    for i = 2, #held, 2 do
      call('HSET', HELD, held[i - 1], (string.gsub(held[i], ':[1-9]%d*:', ':1:')))
    end
    for i = 2, 11 do
      m[COUNTS[i]] = 0
    end
    m.kept = 0
    m.window = window or m.window
    measure()
  end
  m.near = slide(m.near, slot - floor(SLOTS / 6) - SLACK, 'n', false)
  m.from = slide(m.from, slot - SLOTS - SLACK, '', not look)
  for lane = 0, carried and 1 or -1 do
    count(slot, lane, carried[lane][1], carried[lane][2])
  end
  if look then
    running = call('ZCOUNT', TICKETS, '(' .. int(now), '+inf')
    return
  end
  -- Leases that ran out: the streams come back, what was reserved counts as used.
  local lost = call('ZRANGEBYSCORE', TICKETS, '-inf', now, 'LIMIT', 0, 500)
  for _, ticket in ipairs(lost) do
    local record = call('HGET', HELD, ticket)
    if record and string.sub(record, 1, 1) == '1' then
      m.holding = m.holding - 1
    end
    call('HDEL', HELD, ticket)
    call('ZREM', TICKETS, ticket)
  end
  running = call('ZCARD', TICKETS)
  m.holding = min(m.holding, running) -- the tickets may have expired as a whole
  -- Times to live are set where a key begins, and again six times a window: by whatever is called then, until an acquire,
  -- which knows all of them, has done it.
  keep = now - m.kept >= m.window / 6
end

local function save_meter(lease)
  local values = {}
  for i, name in ipairs(COUNTS) do
    values[i] = m[name]
  end
  local changed = string.format(PACK, unpack(values))
  if changed ~= packed then
    call('HSET', METER, 'counts', changed)
  end
  if keep then
    call('PEXPIRE', METER, KEPT)
    call('PEXPIRE', USED, 3 * m.window)
  end
  if lease and keep then
    call('PEXPIRE', TICKETS, lease + m.window)
    call('PEXPIRE', HELD, lease + m.window)
  end
end

-- Add to the counts of a slot. A slot that has left gives nothing back, nor one of another width.
function count(at, lane, requests, tokens)
  if at < m.from or at > slot then
    return
  end
  local prefix = lane == 1 and 'b' or ''
  if requests ~= 0 and call('HINCRBY', USED, prefix .. 'r' .. at, int(requests)) == requests then
    call('PEXPIRE', USED, 3 * m.window) -- the first of a slot
  end
  if tokens ~= 0 then
    call('HINCRBY', USED, prefix .. 't' .. at, int(tokens))
  end
  local near = at >= m.near
  m.r, m.t = m.r + requests, m.t + tokens
  if near then
    m.rn, m.tn = m.rn + requests, m.tn + tokens
  end
  if lane == 1 then
    m.br, m.bt = m.br + requests, m.bt + tokens
    if near then
      m.brn, m.btn = m.brn + requests, m.btn + tokens
    end
  end
end

-- Requests and tokens a window as they are now: what was set, what the upstream says, what it was slowed down to. 0: none.
local function limits()
  local rpm, tpm = m.rpm, m.tpm
  if m.seen > now or m.pace > 0 then
    read_seldom()
  end
  if m.seen > now then
    if m.rpm_seen > 0 then
      rpm = rpm > 0 and min(rpm, m.rpm_seen) or m.rpm_seen
    end
    if m.tpm_seen > 0 then
      tpm = tpm > 0 and min(tpm, m.tpm_seen) or m.tpm_seen
    end
  end
  if m.pace > 0 then -- 5 % more every sixth of a window
    local pace = m.pace * 1.05 ^ ((now - m.paced) / (m.window / 6))
    if pace < (m.rpm > 0 and m.rpm or 4 * m.base) then
      rpm = rpm > 0 and min(rpm, pace) or pace
    end
  end
  return rpm, tpm
end

-- What batch may take of a limit.
local function part(limit)
  return max(1, floor(limit * (1 - m.share)))
end

-- What a sixth of the window gets. Below 8 a quarter rounded down would leave no way to use the limit up.
local function near_limit(limit)
  return limit < 8 and math.ceil(limit / 4) or floor(limit / 4)
end

-- When the oldest slot that counts leaves: of both lanes (`lane` 0), or of batch alone (1).
local function leaves(from, field, span, lane)
  for i = from, slot do
    local v = call('HMGET', USED, 'b' .. field .. i, field .. i)
    if tonumber(v[1] or 0) > 0 or lane == 0 and tonumber(v[2] or 0) > 0 then
      return (i + span + SLACK + 1) * width
    end
  end
  return now + width
end

-- What a lane may take of one measure now.
local function room(field, lane, limit)
  if limit <= 0 then
    return math.huge
  end
  local near, names = near_limit(limit), PARTS[field]
  local left = min(limit - m[field], near - m[names.near])
  if lane == 1 then
    left = min(left, part(limit) - m[names.batch], math.ceil(near * (1 - m.share)) - m[names.batch_near])
  end
  return left
end

-- Until when one measure, which has less room than that, holds a request of this cost back: nil when it goes alone, since
-- it is larger than a part of the limit and nothing else counts there.
local function held_back(field, lane, cost, limit)
  local near, sixth, names = near_limit(limit), floor(SLOTS / 6), PARTS[field]
  local function full(name, most)
    return m[name] > 0 and m[name] + cost > most
  end
  if full(field, limit) then
    return leaves(m.from, field, SLOTS, 0)
  elseif full(names.near, near) then
    return leaves(m.near, field, sixth, 0)
  elseif lane == 1 and full(names.batch, part(limit)) then
    return leaves(m.from, field, SLOTS, 1)
  elseif lane == 1 and full(names.batch_near, math.ceil(near * (1 - m.share))) then
    return leaves(m.near, field, sixth, 1)
  end
  return nil
end

-- The time between two tickets (ms) at which a sixth of a window gets its quarter, and the measure that says so. Tokens
-- are those that requests were counted as lately: most take less than was reserved.
local function spacing(lane, tokens, rpm, tpm)
  local gap, why = rpm > 0 and 1 / near_limit(rpm) or 0, 'requests'
  local by_tokens = tpm > 0 and (m.r > 0 and min(tokens, m.t / m.r) or tokens) / near_limit(tpm) or 0
  if by_tokens > gap then
    gap, why = by_tokens, 'tokens'
  end
  return min(gap * m.window / 6 / (lane == 1 and 1 - m.share or 1), m.window / 60), why
end

-- Why a request may not be made now and when to ask again (ms, the earliest), nil when it may; and the room there is, of
-- requests and of tokens, unless it cools.
local function blocked(lane, tokens, rpm, tpm)
  if m.cooling > now then
    return 'cooling', m.cooling
  end
  local requests_left, tokens_left = room('r', lane, rpm), room('t', lane, tpm)
  local at = requests_left < 1 and held_back('r', lane, 1, rpm) or nil
  local why = at and 'requests'
  local later = tokens_left < tokens and held_back('t', lane, tokens, tpm)
  if later and later > (at or 0) then
    why, at = 'tokens', later
  end
  if m.streams > 0 then
    local full = running >= m.streams or (lane == 1 and m.holding >= part(m.streams))
    if full and (at or 0) < now + 2 * width then -- nobody knows when a stream ends: its settle says so
      why, at = why or 'streams', now + 2 * width
    end
  end
  return why, at, requests_left, tokens_left
end

-- Tokens to reserve: the prompt and the most it may answer; where that is not said, what such answers took lately.
local function cost_of(prompt, most)
  if most ~= '' then
    return prompt + most
  end
  read_seldom()
  local answer = m.samples >= 5 and math.ceil(m.mean + 2 * m.deviation) or 1000
  local tokens = prompt + answer
  return m.tpm > 0 and min(tokens, max(m.tpm, tonumber(prompt))) or tokens
end

local function grant(ticket, lane, tokens, lease)
  count(slot, lane, 1, tokens)
  local new = call('HSET', HELD, ticket, lane .. ':' .. int(slot) .. ':' .. int(tokens)) == 1
  call('ZADD', TICKETS, now + lease, ticket)
  if running == 0 then
    call('PEXPIRE', TICKETS, lease + m.window)
    call('PEXPIRE', HELD, lease + m.window)
  end
  if new then -- a delivery may have stood in line twice
    running = running + 1
    m.holding = m.holding + lane
  end
end

-- A ticket is no longer held: its lane, the slot it counts in and the tokens it reserved, or nil.
local function release(ticket)
  local record = call('HGET', HELD, ticket)
  if not record then
    return nil
  end
  call('HDEL', HELD, ticket)
  running = running - call('ZREM', TICKETS, ticket)
  local lane, at, reserved = string.match(record, '(%d+):(%d+):(%d+)')
  m.holding = m.holding - lane
  return tonumber(lane), tonumber(at), tonumber(reserved)
end

local function set_limits(name, rpm, tpm, streams, share)
  if m.rpm ~= rpm or m.tpm ~= tpm or m.streams ~= streams or m.share ~= share then
    m.rpm, m.tpm, m.streams, m.share = rpm, tpm, streams, share
    call('HSET', METER, 'rpm', rpm, 'tpm', tpm, 'streams', streams, 'share', share)
  end
  if keep then
    call('ZADD', MEASURES, now + KEPT, name)
    call('PEXPIRE', MEASURES, KEPT)
  end
end
